#!/usr/bin/env bash
# usage: scripts/demo.sh RUN      The main job on scikit-learn's handwritten digits: convert, pre-train, evaluate.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/demo}
data=$run-data
export DS_ACCELERATOR=${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
# Only what an earlier demo made is deleted: it left its mark.
if { [ -e "$run" ] || [ -e "$data" ]; } && [ ! -e "$data/.made-by-demo" ]; then
    echo "demo: error: $run or $data exists and is not from a demo: choose another folder with DEMO=" >&2
    exit 2
fi
rm -rf "$run" "$data"
mkdir -p "$data"
touch "$data/.made-by-demo"
SECONDS=0
fastssl convert --from digits "$data/train.beton" --split train
fastssl convert --from digits "$data/test.beton" --split test
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
deepspeed --num_gpus 1 --master_port "$port" --log_level error fastssl/train.py --cfg configs/demo.yaml \
    --set run.dir="$run" data.train="$data/train.beton" data.test="$data/test.beton"
fastssl eval "$run"
cat <<END

data          $data/train.beton, $data/test.beton
run           $run
views         $run/views.png    what the network saw
curves        $run/curves.png
metrics       $run/metrics.jsonl, $run/tensorboard
results       $run/eval.jsonl
encoder       $(ls -d "$run"/checkpoints/step_*/weights.pt | tail -n 1)
took          ${SECONDS} s
END
