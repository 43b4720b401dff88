#!/usr/bin/env bash
# Requests a TPU slice (a queued resource) and waits until it is there. The same command again goes on waiting.
#
# usage: create.sh [--dry-run] [--help]
#
# From the environment:
TPU_NAME=${TPU_NAME:-}                # required; the slice and its request have this name
ZONE=${ZONE:-}                        # required
PROJECT=${PROJECT:-}                  # gcloud's own unless set
ACCELERATOR=${ACCELERATOR:-}          # required: v5litepod-16, v5p-16, v6e-16, ...
RUNTIME=${RUNTIME:-}                  # the machine image; follows from the accelerator unless set
SPOT=${SPOT:-yes}                     # yes: cheap, and can be taken away; no: on demand; reserved: a reservation
WAIT=${WAIT:-6h}                      # a request that is not filled by then is given up and cannot cost anything
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}  # whose rights the hosts have, on gs:// for one; the project's default unless set
POLL=${POLL:-30}                      # seconds between two looks

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for word in "$@"; do option "$word"; done
need_tpu
need ACCELERATOR "the slice's type, such as v6e-16"
if [ -z "$RUNTIME" ]; then
  case $ACCELERATOR in
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v[234]-*) RUNTIME=tpu-ubuntu2204-base ;;
    *) die "ACCELERATOR: no runtime known for '$ACCELERATOR'; set RUNTIME, or use v5litepod-N, v5p-N or v6e-N" ;;
  esac
fi
case $SPOT in
  yes) price=(--spot) ;;
  no) price=() ;;
  reserved) price=(--reserved) ;;
  *) die "SPOT: '$SPOT' is not yes, no or reserved" ;;
esac

state() { gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" '--format=value(state.state)'; }

if [ -n "$DRY_RUN" ] || ! state >/dev/null 2>&1; then
  run gcloud compute tpus queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" "${where[@]}" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${price[@]}" --valid-until-duration="$WAIT" \
    ${SERVICE_ACCOUNT:+--service-account="$SERVICE_ACCOUNT"}
fi
if [ -n "$DRY_RUN" ]; then
  run gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" '--format=value(state.state)'
  exit
fi
before=
while :; do
  now=$(state) || fail "the request $TPU_NAME cannot be read; gcloud's message is above"
  [ "$now" = "$before" ] || echo "$(date +%H:%M:%S) $TPU_NAME: $now"
  before=$now
  case $now in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      fail "$TPU_NAME is $now and will not come; run delete.sh, then create.sh again (another ZONE, a longer WAIT)" ;;
  esac
  sleep "$POLL"
done
