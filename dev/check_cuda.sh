#!/bin/sh
# Everything once on one CUDA GPU, its log on standard output: the tests marked gpu, those that run kernels on a GPU where
# there is one, then every verb of the command.
#     sh dev/check_cuda.sh > cuda.log 2>&1
export PYTHONPATH=src COLUMNS=160
folder=$(mktemp -d)
engram() {
    echo "\$ engram $*" | sed "s#$folder#FOLDER#g"
    python -c "from torch_engram.cli import main; main()" "$@" 2>&1 | tr '\r' '\n' | sed "s#$folder#FOLDER#g" | tail -n 25
}

date -u +%F
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python -c "import sys, torch, triton; print('python', sys.version.split()[0], 'torch', torch.__version__, 'triton', triton.__version__)"
tests() {
    python -m pytest "$@" -n 14 -v -p no:cacheprovider -p no:benchmark -W default -rsxf --tb=short --show-capture=no \
        --durations 8 --disable-warnings 2>&1 | grep -v PASSED | tail -n 80
}
tests tests -m gpu
tests $(grep -rl 'cuda.is_available' tests --include='test_*.py') -m 'not gpu'
engram demo --out "$folder/demo" --set device=cuda --set dtype=bf16 --set steps=40
engram train small-engram --set device=cuda --set steps=20 --set seq_len=1024 --set out="$folder/runs" --set cache="$folder/cache"
run=$folder/demo/runs/engram
engram gates "$run" --text "Only Alexander the Great could tame the horse." --html "$folder/gates.html"
engram trace --checkpoint "$run" --text "By the way"
engram sample "$run" --prompt "The United States" --prompt "By the way," --tokens 20 --device cuda
ls -l "$folder/gates.html" "$folder/demo/report.html" | sed "s#$folder#FOLDER#g" | cut -d' ' -f5-
engram bench ops --against compile --out "$folder/bench"
engram bench step small-moe small-engram --against naive --set batch_size=32 --set cache="$folder/cache" --out "$folder/bench"
engram bench lookup --text-cache "$folder/cache" --cache 1GB --chunks 4 --steps 50 --out "$folder/bench"
rm -rf "$folder"
