#!/usr/bin/env bash
# Starts training on every host of the slice. It outlives the ssh, and starts again after a preemption that saved.
#
# usage: launch.sh [--dry-run] [--help] CONFIG [SECTION.KEY=VALUE]...    start, or resume
#        launch.sh [--dry-run] --stop                                    save and end
#
# CONFIG is a path on the hosts: configs/... of the package, or a file that setup.sh sent.
#
# From the environment:
TPU_NAME=${TPU_NAME:-}        # required
ZONE=${ZONE:-}                # required
PROJECT=${PROJECT:-}          # gcloud's own unless set
RESTART_ON=${RESTART_ON:-75}  # exit codes after which the same command starts again; parted by spaces

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
verb=start
while [[ ${1:-} == -* ]]; do
  if [ "$1" = --stop ]; then verb=stop; else option "$1"; fi
  shift
done
need_tpu
[[ $RESTART_ON =~ ^[0-9\ ]*$ ]] || die "RESTART_ON: '$RESTART_ON' is not a list of exit codes such as \"75 69\""
if [ $verb = stop ]; then
  [ $# = 0 ] || die "--stop takes no CONFIG"
  on_hosts all "cd $ON_HOST && bash src/tpu_scripts/on_host.sh stop"
else
  [ $# -gt 0 ] || die "CONFIG is missing; as in launch.sh configs/mpd.yaml run.dir=gs://my-bucket/runs/mpd"
  settings "$@"
  on_hosts all "cd $ON_HOST && RESTART_ON=$(quote "$RESTART_ON") bash src/tpu_scripts/on_host.sh start \
$(quote mpd-jax train "$@")"
fi
