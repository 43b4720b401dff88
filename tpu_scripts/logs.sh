#!/usr/bin/env bash
# Follows the output of the run; Ctrl-C ends the following, not the run.
#
# usage: logs.sh [--dry-run] [--help]
#
# From the environment:
TPU_NAME=${TPU_NAME:-}  # required
ZONE=${ZONE:-}          # required
PROJECT=${PROJECT:-}    # gcloud's own unless set
WORKER=${WORKER:-0}     # 0, 1, ... or all; every line starts with its host
TAIL=${TAIL:-50}        # lines of the past

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for word in "$@"; do option "$word"; done
need_tpu
[[ $TAIL =~ ^[0-9]+$ ]] || die "TAIL: '$TAIL' is not a number of lines"
on_hosts "$WORKER" "tail -n $TAIL -F $ON_HOST/train.log | sed -u \"s/^/\$(hostname): /\""
