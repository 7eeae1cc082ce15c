#!/bin/sh
# compute-sanitizer over the kernel tests on one CUDA GPU: wrong memory accesses (memcheck) and races in shared memory
# (racecheck) of our own kernels, whose names begin with an underscore and a small letter. Allocations are PyTorch's
# own, one cudaMalloc each, so that an access past the end of a tensor is past the end of its memory. Run the tests
# without it first: kernels are then compiled already. Its log on standard output:
#     sh dev/check_sanitizer.sh [SECONDS A FILE [TOOL [FILE ...]]] > sanitizer.log 2>&1
export PYTHONPATH=src PYTORCH_NO_CUDA_MEMORY_CACHING=1 COLUMNS=120
seconds=${1:-600}
tools=${2:-memcheck racecheck}
[ $# -gt 2 ] && shift 2 && files=$* \
    || files=$(find tests -name 'test_*kernels.py' -o -name test_fused.py -o -name test_fp8.py -o -name test_loss.py | sort)
folder=$(mktemp -d)
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)

date -u +%F
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$sanitizer" --version | tail -n 1
for tool in $tools; do
    for file in $files; do
        name=$tool-$(basename "$file" .py)
        timeout -s INT "$seconds" "$sanitizer" --tool "$tool" --kernel-name regex='^_[a-z]' --report-api-errors no \
            --launch-timeout 120 --target-processes all python -m pytest "$file" -n 3 -p no:cacheprovider -p no:benchmark \
            -W default -k 'not compile and not traced' --disable-warnings --tb=line > "$folder/$name" 2>&1 &
    done
done
wait
# A hazard's two accesses, on lines of their own, are put on one; of their places in the machine code is told whether they
# are one instruction, by which threads of a warp store the same number.
for log in "$folder"/*; do
    echo "== $(basename "$log")"
    sed -E 's/.*(Error|Warning): Race reported between/=== \1:/; s/ \[[0-9]+ hazards\]//' "$log" \
        | sed -E '/^=== /{N; s/\n=========[ ]+and/ and/}' \
        | sed -E 's/(\S+\+0x[0-9a-f]+) in (\S+) and (\w+) access at \1 in .*/\1 in \2 and \3, one instruction/; s/\+0x[0-9a-f]+//g' \
        | grep -E '[0-9]+ (passed|failed)|SUMMARY|Error|=========     at ' | sort | uniq -c | sort -rn | head -n 16
done
rm -rf "$folder"
