#!/usr/bin/env bash
# Deletes the slice and its request, then lists what is left in the zone. What is only on the hosts' disks is lost.
#
# usage: delete.sh [--yes] [--dry-run] [--help]        --yes: gcloud does not ask
#
# From the environment:
TPU_NAME=${TPU_NAME:-}  # required
ZONE=${ZONE:-}          # required
PROJECT=${PROJECT:-}    # gcloud's own unless set

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
yes=()
for word in "$@"; do
  if [ "$word" = --yes ]; then yes=(--quiet); else option "$word"; fi
done
need_tpu
run gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force "${yes[@]}"
run gcloud compute tpus queued-resources list "${where[@]}"
run gcloud compute tpus tpu-vm list "${where[@]}"
