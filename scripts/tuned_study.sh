#!/usr/bin/env bash
# usage: scripts/tuned_study.sh [--on-test] [--jobs N]      The tuned study of docs/results.md, N runs at a time.
# 138 runs, each about a minute of one core. Needs data/cifar10_10k.beton and data/cifar10_test.beton. Every choice is made on
# held-out training images; --on-test, at the end, judges the same runs on the test images. The same command resumes it.
set -euo pipefail
cd "$(dirname "$0")/.."
options=("$@")
study() {  # FOLDER CONFIGURATION... --OPTION...
    local out=runs/tuned/$1 configs=()
    shift
    while [[ $# -gt 0 && $1 != --* ]]; do
        configs+=("configs/tuned_study/$1.yaml")
        shift
    done
    fastssl compare "${configs[@]}" --base configs/tuned_study/base.yaml --out "$out" "$@" "${options[@]}"
}
chosen() {  # FOLDER: the learning rate that was chosen there
    python -c 'import csv, sys; print(next(csv.DictReader(open(sys.argv[1])))["tuned"])' "runs/tuned/$1/compare.csv"
}
# Around .2, divided by the norm of the gradient relative to SimCLR's (benchmarks/results/gradnorm.csv), to a factor of 2;
# Barlow Twins and VICReg, with a norm of 60, get somewhat more than that.
usual="optim.base_lr=.05,.2,.8"
slower="optim.base_lr=.0125,.05,.2"
slowest="optim.base_lr=.003,.0125,.05"
faster="optim.base_lr=.2,.8,3.2"

for loss in mio_exp simclr; do study "$loss" "$loss" --tune "$usual"; done
study mio_naive mio_naive --tune "$faster"
study spectral_mu10 spectral_mu10 --tune "$usual"
study minc minc_unit minc_clip minc_none --tune "$slower"
study dcl dcl --tune "$slower"
study byol byol --tune "$usual"
for loss in barlow_twins vicreg; do study "$loss" "$loss" --tune "$slowest"; done
study simsiam simsiam --tune "$faster"
for loss in spectral_mu1 mio_jensen mio_quadratic mio_softplus; do study "$loss" "$loss" --tune "$usual"; done
batches="data.global_batch_size=32,64,256,512"  # 128: above
study batch_spectral spectral_mu10 --sweep "$batches" --set "$(chosen spectral_mu10)"
clip=$(python -c 'import csv; rows = csv.DictReader(open("runs/tuned/minc/compare.csv"))
print(next(row["tuned"] for row in rows if row["config"] == "minc_clip"))')
study batch_minc minc_clip --sweep "$batches" --set "$clip"
study simclr_temperature simclr --set "$(chosen simclr)" --tune "loss.temperature=.2,.5,1.0"
study dcl_temperature dcl --set "$(chosen dcl)" --tune "loss.temperature=.1,.2,.5"
study mio_temperature mio_exp --set "$(chosen mio_exp)" --tune "loss={name: mio, temperature_positive: 0.2, \
temperature_negative: 0.2},{name: mio},{name: mio, temperature_positive: 1.0, temperature_negative: 1.0}"
