#!/usr/bin/env bash
# What launch.sh calls on every host of the slice, in the directory that setup.sh made. Not for a person to call.
#
#   on_host.sh start COMMAND...  runs COMMAND detached from the ssh that asked for it, its output in train.log
#   on_host.sh stop              SIGTERM to it, and no restart: the run saves and ends
#   on_host.sh run COMMAND...    the loop behind start: COMMAND again whenever it ends with a code of RESTART_ON
set -euo pipefail

RESTART_ON=${RESTART_ON:-75}         # exit codes: 75 was asked to stop, by a preemption for one, and has saved
MAX_RESTARTS=${MAX_RESTARTS:-100}
RESTART_PAUSE=${RESTART_PAUSE:-10}   # seconds, in which the other hosts end too

verb=$1
shift
here=$(hostname)
case $verb in
  start)
    exec 9>>lock # held as long as anything that was started lives
    flock -n 9 || { echo "error: $here: a run is under way; launch.sh --stop ends it" >&2; exit 1; }
    setsid nohup bash "${BASH_SOURCE[0]}" run "$@" >>train.log 2>&1 </dev/null &
    echo "$!" >pid
    echo "$here: started"
    ;;
  stop)
    if (flock -n 9) 9>>lock; then
      echo "$here: nothing runs"
    else
      kill -TERM "$(cat pid)" && echo "$here: told to save and end"
    fi
    ;;
  run)
    if [ -f secrets.env ]; then
      set -a
      # shellcheck source=/dev/null
      . ./secrets.env
      set +a
    fi
    PATH="$PWD/venv/bin:$PATH"
    child='' stopped=''
    trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM
    for ((restarts = 0; ; restarts++)); do
      echo "--- $(date -u +%FT%TZ) $here: start, after $restarts restarts"
      "$@" &
      child=$!
      wait "$child" || : # a signal ends this early, hence the loop; the code is asked for once it is gone
      while kill -0 "$child" 2>/dev/null; do wait "$child" || :; done
      code=0
      wait "$child" || code=$?
      echo "--- $(date -u +%FT%TZ) $here: exit code $code"
      [ -z "$stopped" ] && [[ " $RESTART_ON " == *" $code "* ]] && ((restarts < MAX_RESTARTS)) || exit "$code"
      sleep "$RESTART_PAUSE" &
      wait "$!" || :
      [ -z "$stopped" ] || exit "$code"
    done
    ;;
  *)
    echo "error: on_host.sh: unknown verb '$verb'; start, stop or run" >&2
    exit 2
    ;;
esac
