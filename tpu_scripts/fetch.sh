#!/usr/bin/env bash
# Copies a run's results to this machine: metrics, trajectories, evaluations, curves.
#
# usage: fetch.sh [--dry-run] [--help]
#
# From the environment:
RUN_DIR=${RUN_DIR:-}                   # required: the run.dir of the run, gs://... or a path on worker 0
TO=${TO:-}                             # where to; results/NAME unless set, after the last part of RUN_DIR
EXCLUDE=${EXCLUDE-'^checkpoints/.*'}   # of a gs:// address: what stays there, a regular expression; empty: nothing
TPU_NAME=${TPU_NAME:-}                 # required unless RUN_DIR is a gs:// address, as are the next two
ZONE=${ZONE:-}
PROJECT=${PROJECT:-}                   # gcloud's own unless set

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for word in "$@"; do option "$word"; done
need RUN_DIR "the run.dir of the run"
RUN_DIR=${RUN_DIR%/}
TO=${TO:-results/${RUN_DIR##*/}}
[[ $RUN_DIR == gs://* ]] || need_tpu
run mkdir -p "$TO"
if [[ $RUN_DIR == gs://* ]]; then
  run gcloud storage rsync "$RUN_DIR" "$TO" --recursive ${EXCLUDE:+--exclude="$EXCLUDE"}
else
  [[ $RUN_DIR == /* ]] || RUN_DIR=$ON_HOST/$RUN_DIR
  run gcloud compute tpus tpu-vm scp "$TPU_NAME:$RUN_DIR/*" "$TO" "${where[@]}" --worker=0 --recurse
fi
