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
MODEL=${MODEL:-}                    # required: a hub id, such as Qwen/Qwen3-8B, or a directory under MOUNT
REVISION=${REVISION:-}              # required of a hub id: the commit of the model, as in the config of the run
MOUNT=${MOUNT:-}                    # a directory of the machine that the server sees too, for a student's weights
CHIPS=${CHIPS:-8}                   # over how many chips or GPUs the model is split
MAX_MODEL_LEN=${MAX_MODEL_LEN:-32768}  # prompt and response together
MAX_LOGPROBS=${MAX_LOGPROBS:-}      # at least recipe.target.top_k; 64, on TPU, where all requests pay for it, 20
LISTEN=${LISTEN:-}                  # the address to listen at; the machine's internal one unless set
PORT=${PORT:-8000}
EXTRA=${EXTRA:-}                    # further flags of vllm serve, such as "--enable-lora --max-lora-rank 64"
IMAGE=${IMAGE:-}                    # vllm/vllm-tpu:latest or vllm/vllm-openai:latest unless set; better pinned
READY=${READY:-1800}                # seconds for download, load and compilation
SECRETS_FILE=${SECRETS_FILE:-}      # lines NAME=value (HF_TOKEN, VLLM_API_KEY, VLLM_*), mode 600; never printed

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
stop=
for word in "$@"; do
  if [ "$word" = --stop ]; then stop=yes; else option "$word"; fi
done
need_tpu
case $ON in
  tpu)
    IMAGE=${IMAGE:-vllm/vllm-tpu:latest} MAX_LOGPROBS=${MAX_LOGPROBS:-20} memory=()
    device=(--privileged --shm-size=150gb -v /dev/shm:/dev/shm)
    ;;
  gpu)
    IMAGE=${IMAGE:-vllm/vllm-openai:latest} MAX_LOGPROBS=${MAX_LOGPROBS:-64}
    # The logits of prompts that are scored are no part of what vLLM plans with.
    memory=(--max-num-batched-tokens 2048 --gpu-memory-utilization 0.85)
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
[[ $MODEL == /* ]] || need REVISION "the commit of the model, 40 hexadecimal digits"
check_secrets
for name in CHIPS MAX_MODEL_LEN MAX_LOGPROBS PORT READY; do
  [[ ${!name} =~ ^[0-9]+$ ]] || die "$name: '${!name}' is not a number"
done

on_hosts 0 "mkdir -p $ON_HOST && chmod 700 $ON_HOST && touch $ON_HOST/secrets.env && chmod 600 $ON_HOST/secrets.env"
[ -z "$SECRETS_FILE" ] || to_hosts 0 "$SECRETS_FILE" "$ON_HOST/secrets.env"
container=(sudo docker run --detach --name teacher --restart unless-stopped --net=host "${device[@]}"
  -v models:/models -e HF_HOME=/models --env-file "$ON_HOST/secrets.env" ${MOUNT:+-v "$MOUNT:$MOUNT"}
  --env VLLM_HTTP_TIMEOUT_KEEP_ALIVE=60 --entrypoint bash "$IMAGE")
# Another seed at every start, or requests without one draw the same again.
# shellcheck disable=SC2016  # the container's shell expands it
server=(-c 'exec vllm serve "$0" --seed "$RANDOM" "$@"' "$MODEL" ${REVISION:+--revision "$REVISION"}
  --served-model-name teacher --port "$PORT" --tensor-parallel-size "$CHIPS" --max-model-len "$MAX_MODEL_LEN"
  --max-logprobs "$MAX_LOGPROBS" "${memory[@]}")
read -ra extra <<<"$EXTRA"
if [ -n "$LISTEN" ]; then at=$(quote "$LISTEN"); else at="\$(hostname -I | cut -d' ' -f1)"; fi
on_hosts 0 "at=$at; $(quote "${container[@]}" "${server[@]}") --host \"\$at\" $(quote "${extra[@]}")"
# A healthy server can still die of its first request, so one is made. The key goes from file to curl by a pipe.
on_hosts 0 "set -eu
at=$at
. $ON_HOST/secrets.env
for ((end = SECONDS + $READY; SECONDS < end; )); do
  [ \"\$(sudo docker inspect --format '{{.RestartCount}}' teacher)\" = 0 ] || break
  if curl -sf \"http://\$at:$PORT/health\" &&
    printf 'header = \"Authorization: Bearer %s\"\n' \"\${VLLM_API_KEY:-}\" |
    curl -sSf --max-time 300 -K - -H 'Content-Type: application/json' \\
      -d '{\"model\": \"teacher\", \"prompt\": \"1 + 1 =\", \"max_tokens\": 4}' \"http://\$at:$PORT/v1/completions\"; then
    echo
    echo \"serves at http://\$at:$PORT/v1\"
    exit 0
  fi
  sleep 5
done
sudo docker logs --tail 40 teacher >&2
exit 1"
