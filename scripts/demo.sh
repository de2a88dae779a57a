#!/usr/bin/env bash
# usage: scripts/demo.sh RUN      The main job on scikit-learn's handwritten digits: convert, pre-train, evaluate.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/demo}
data=$run-data
export DS_ACCELERATOR=${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
if [ -e "$run" ] && [ ! -e "$run/config.yaml" ]; then
    echo "demo: error: $run exists and is no run of fastssl: choose another with DEMO=" >&2
    exit 2
fi
rm -rf "$run" "$data"
mkdir -p "$data"
SECONDS=0
fastssl convert --from digits "$data/train.beton" --split train
fastssl convert --from digits "$data/test.beton" --split test
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
deepspeed --master_port "$port" --log_level error fastssl/train.py --cfg configs/demo.yaml \
    --set run.dir="$run" data.train="$data/train.beton" data.test="$data/test.beton"
fastssl eval "$run"
cat <<END

data          $data/train.beton, $data/test.beton
run           $run
views         $run/views.png    what the network saw
curves        $run/curves.png
metrics       $run/metrics.jsonl, $run/tensorboard
results       $run/eval.json
encoder       $(ls -d "$run"/checkpoints/step_*/weights.pt | tail -n 1)
took          ${SECONDS} s
END
