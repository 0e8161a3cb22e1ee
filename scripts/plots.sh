#!/bin/sh
# Draws docs/plots anew: the starter corpus, a reward model of the sentence encoder, in a home of its own that goes away.
#
#   scripts/plots.sh             some five minutes on two cores
#   scripts/plots.sh --umap      with UMAP's pictures too, as they are committed; any option of `evaluate map` goes through
#
# The encoder (90 MB) is fetched unless it is installed.
set -eu

root=$(CDPATH='' cd -P -- "$(dirname -- "$0")/.." && pwd -P)
hominem=$root/bin/hominem
HOMINEM_HOME=$(mktemp -d)
export HOMINEM_HOME
trap 'rm -rf "$HOMINEM_HOME"' EXIT

"$hominem" init --base starter --starter
"$hominem" data split
"$hominem" doctor --get-encoder >/dev/null
"$hominem" train reward reward.backbone=encoder
"$hominem" evaluate map --folder "$root/docs/plots" "$@"
