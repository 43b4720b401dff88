#!/usr/bin/env bash
# Starts training on a TPU slice of a GKE cluster, as an xpk workload. It restarts after a preemption that saved.
#
# usage: gke.sh [--dry-run] [--help] CONFIG [SECTION.KEY=VALUE]...    start, or resume
#        gke.sh [--dry-run] --delete                                  SIGTERM: the run saves; then the workload goes
#
# CONFIG is a path in the image.
#
# From the environment:
WORKLOAD=${WORKLOAD:-}          # required: the workload's name
CLUSTER=${CLUSTER:-}            # required: a cluster that xpk made
ZONE=${ZONE:-}                  # required
PROJECT=${PROJECT:-}            # gcloud's own unless set
TPU_TYPE=${TPU_TYPE:-}          # required to start: v5litepod-16, v5p-16, v6e-16, ...
SLICES=${SLICES:-1}
IMAGE=${IMAGE:-}                # required to start: an image in which mpd-jax is installed (README.md)
MAX_RESTARTS=${MAX_RESTARTS:-50}
RESTART_ON=${RESTART_ON:-69,75} # besides xpk's own 42 and 127-255: 75 saved, 69 another host has died
GRACE=${GRACE:-120}             # seconds between SIGTERM and SIGKILL, for the checkpoint
SECRETS_FILE=${SECRETS_FILE:-}  # lines NAME=value, mode 600; xpk writes them into the workload's manifest

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
verb=create
while [[ ${1:-} == -* ]]; do
  if [ "$1" = --delete ]; then verb=delete; else option "$1"; fi
  shift
done
need WORKLOAD "the workload's name"
need CLUSTER "the cluster's name"
need ZONE "the cluster's zone"
where=(--workload="$WORKLOAD" --cluster="$CLUSTER" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
if [ $verb = delete ]; then
  [ $# = 0 ] || die "--delete takes no CONFIG"
  run xpk workload delete "${where[@]}"
  exit
fi
need TPU_TYPE "the slice's type, such as v6e-16"
need IMAGE "a container image in which mpd-jax is installed"
check_secrets
[ $# -gt 0 ] || die "CONFIG is missing; as in gke.sh configs/mpd.yaml run.dir=gs://my-bucket/runs/mpd"
settings "$@"
# xpk puts the command into one line of YAML and one subshell, which exec leaves to mpd-jax: SIGTERM reaches it.
[[ $* != *$'\n'* ]] || die "a word of the command holds a line break, which xpk cannot carry"
run xpk workload create "${where[@]}" --tpu-type="$TPU_TYPE" --num-slices="$SLICES" --docker-image="$IMAGE" \
  --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes="$RESTART_ON" --termination-grace-period-seconds="$GRACE" \
  ${SECRETS_FILE:+--env-file="$SECRETS_FILE"} --command="exec $(quote mpd-jax train "$@")"
