#!/usr/bin/env bash
# Serves a model with vLLM, in a container on a machine of its own, and waits until it has answered once.
#
# usage: serve_teacher.sh [--dry-run] [--help]         serve
#        serve_teacher.sh [--dry-run] --stop           end and remove the server
#
# From the environment:
ON=${ON:-tpu}                       # tpu: a slice of one host; gpu: a VM with Docker and NVIDIA's toolkit for it
TPU_NAME=${TPU_NAME:-}              # required: the name of the slice or of the VM
ZONE=${ZONE:-}                      # required
PROJECT=${PROJECT:-}                # gcloud's own unless set
MODEL=${MODEL:-}                    # required: a hub id, such as Qwen/Qwen3-8B
REVISION=${REVISION:-}              # required: the commit of the model, as in the config of the run
CHIPS=${CHIPS:-8}                   # over how many chips or GPUs the model is split
MAX_MODEL_LEN=${MAX_MODEL_LEN:-32768}  # prompt and response together
MAX_LOGPROBS=${MAX_LOGPROBS:-20}    # the most that a request may ask for; on TPU all requests pay for it
PORT=${PORT:-8000}
IMAGE=${IMAGE:-}                    # vllm/vllm-tpu:latest or vllm/vllm-openai:latest unless set; better pinned
READY=${READY:-1800}                # seconds for download, load and compilation
SECRETS_FILE=${SECRETS_FILE:-}      # lines NAME=value (HF_TOKEN, VLLM_API_KEY), mode 600; never printed

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stop=
for word in "$@"; do
  if [ "$word" = --stop ]; then stop=yes; else option "$word"; fi
done
need_tpu
case $ON in
  tpu)
    IMAGE=${IMAGE:-vllm/vllm-tpu:latest}
    device=(--privileged --shm-size=150gb -v /dev/shm:/dev/shm)
    ;;
  gpu)
    IMAGE=${IMAGE:-vllm/vllm-openai:latest}
    device=(--gpus all --ipc=host)
    on_hosts() { run gcloud compute ssh "$TPU_NAME" "${where[@]}" --command="$2"; }
    to_hosts() { run gcloud compute scp "$2" "$TPU_NAME:$3" "${where[@]}"; }
    ;;
  *) die "ON: '$ON' is not tpu or gpu" ;;
esac
if [ -n "$stop" ]; then
  on_hosts 0 "sudo docker rm --force teacher"
  exit
fi
need MODEL "the model to serve, such as Qwen/Qwen3-8B"
need REVISION "the commit of the model, 40 hexadecimal digits"
check_secrets
for name in CHIPS MAX_MODEL_LEN MAX_LOGPROBS PORT READY; do
  [[ ${!name} =~ ^[0-9]+$ ]] || die "$name: '${!name}' is not a number"
done

on_hosts 0 "mkdir -p $ON_HOST && chmod 700 $ON_HOST && touch $ON_HOST/secrets.env && chmod 600 $ON_HOST/secrets.env"
[ -z "$SECRETS_FILE" ] || to_hosts 0 "$SECRETS_FILE" "$ON_HOST/secrets.env"
container=(sudo docker run --detach --name teacher --restart unless-stopped --net=host "${device[@]}"
  -v models:/models -e HF_HOME=/models --env-file "$ON_HOST/secrets.env"
  --env VLLM_HTTP_TIMEOUT_KEEP_ALIVE=60 --entrypoint vllm "$IMAGE")
server=(serve "$MODEL" --revision "$REVISION" --served-model-name teacher --port "$PORT"
  --tensor-parallel-size "$CHIPS" --max-model-len "$MAX_MODEL_LEN" --max-logprobs "$MAX_LOGPROBS")
on_hosts 0 "$(quote "${container[@]}" "${server[@]}")"
# A healthy server can still die of its first request, so one is made. The key goes from file to curl by a pipe.
on_hosts 0 "set -eu
. $ON_HOST/secrets.env
for ((end = SECONDS + $READY; SECONDS < end; )); do
  [ \"\$(sudo docker inspect --format '{{.RestartCount}}' teacher)\" = 0 ] || break
  if curl -sf http://localhost:$PORT/health &&
    printf 'header = \"Authorization: Bearer %s\"\n' \"\${VLLM_API_KEY:-}\" |
    curl -sSf --max-time 300 -K - -H 'Content-Type: application/json' \\
      -d '{\"model\": \"teacher\", \"prompt\": \"1 + 1 =\", \"max_tokens\": 4}' http://localhost:$PORT/v1/completions; then
    echo
    echo \"serves at http://\$(hostname -I | cut -d' ' -f1):$PORT/v1\"
    exit 0
  fi
  sleep 5
done
sudo docker logs --tail 40 teacher >&2
exit 1"
