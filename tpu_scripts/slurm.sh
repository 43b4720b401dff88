#!/usr/bin/env bash
# Submits training on GPU nodes to SLURM. The job queues itself again after it was asked to stop and has saved.
#
# usage: slurm.sh [--dry-run] [--help] CONFIG [SECTION.KEY=VALUE]...
#
# From the environment:
NODES=${NODES:-1}               # whole nodes
GPUS=${GPUS:-8}                 # of a node, all of them
PER=${PER:-gpu}                 # a process for each gpu, or for each node
CPUS=${CPUS:-}                  # of a process; the site's default unless set
TIME=${TIME:-24:00:00}          # before its end the run saves and the job queues again
JOB=${JOB:-mpd-jax}             # the job's name; its output is in JOB-ID.log
PARTITION=${PARTITION:-}        # the site's default unless set
ACCOUNT=${ACCOUNT:-}            # likewise
VENV=${VENV:-$PWD/.venv}        # where mpd-jax[cuda,data] is installed; every node sees it
SECRETS_FILE=${SECRETS_FILE:-}  # lines NAME=value (HF_TOKEN), mode 600; every node sees it

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
while [[ ${1:-} == -* ]]; do
  option "$1"
  shift
done
for name in NODES GPUS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name: '${!name}' is not a number"
done
case $PER in
  gpu) tasks=$GPUS ;;
  node) tasks=1 ;;
  *) die "PER: '$PER' is not gpu or node" ;;
esac
check_secrets
[ $# -gt 0 ] || die "CONFIG is missing; as in slurm.sh configs/mpd.yaml run.dir=runs/mpd"
settings "$@"
[ -n "$DRY_RUN" ] || [ -x "$VENV/bin/mpd-jax" ] || die "VENV: no $VENV/bin/mpd-jax; pip install '.[cuda,data]' there"
export GPUS PER VENV SECRETS_FILE
run sbatch --job-name="$JOB" --nodes="$NODES" --ntasks-per-node="$tasks" --gpus-per-node="$GPUS" --exclusive \
  --time="$TIME" ${CPUS:+--cpus-per-task="$CPUS"} ${PARTITION:+--partition="$PARTITION"} \
  ${ACCOUNT:+--account="$ACCOUNT"} --export=ALL "$ROOT/tpu_scripts/slurm.sbatch" "$@"
