#!/usr/bin/env bash
# Installs mpd-jax in a virtual environment on every host of the slice. The same command again brings a newer state.
#
# usage: setup.sh [--dry-run] [--help]
#
# From the environment:
TPU_NAME=${TPU_NAME:-}          # required
ZONE=${ZONE:-}                  # required
PROJECT=${PROJECT:-}            # gcloud's own unless set
SOURCE=${SOURCE:-}              # a git checkout, or the address of one; the one this script is in unless set
REF=${REF:-HEAD}                # the commit, tag or branch of SOURCE; what is not committed does not travel
EXTRAS=${EXTRAS:-tpu,gcs,data}  # of the package
PYTHON=${PYTHON:-3.12}          # fetched where a host lacks it
SEND=${SEND:-}                  # files and directories to copy beside it, such as "data my.yaml", parted by spaces
SECRETS_FILE=${SECRETS_FILE:-}  # lines NAME=value (HF_TOKEN), mode 600; copied as a file, never printed

# shellcheck source=tpu_scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for word in "$@"; do option "$word"; done
need_tpu
check_secrets
SOURCE=${SOURCE:-$ROOT}
[[ $SOURCE != *://*@* ]] || die "SOURCE: an address that holds a password would be printed; use a checkout"
read -ra send <<<"$SEND"
for file in "${send[@]}"; do [ -e "$file" ] || die "SEND: no file or directory '$file'"; done
if [ -d "$SOURCE" ]; then
  git -C "$SOURCE" rev-parse --verify --quiet "$REF^{commit}" >/dev/null || die "REF: no commit '$REF' in $SOURCE"
fi

on_hosts all "mkdir -p $ON_HOST && chmod 700 $ON_HOST"
if [ -d "$SOURCE" ]; then
  [ -z "$(git -C "$SOURCE" status --porcelain)" ] || echo "note: $SOURCE has changes that are not in $REF" >&2
  packed=$(mktemp -d)/source.tar.gz
  trap 'rm -rf "$(dirname "$packed")"' EXIT
  run git -C "$SOURCE" archive --format=tar.gz --output="$packed" "$REF"
  to_hosts all "$packed" "$ON_HOST/source.tar.gz"
  unpack="rm -rf src && mkdir src && tar -xzf source.tar.gz -C src"
else
  unpack="rm -rf src && git clone --quiet $(quote "$SOURCE") src && git -C src checkout --quiet $(quote "$REF")"
fi
[ -z "$SECRETS_FILE" ] || to_hosts all "$SECRETS_FILE" "$ON_HOST/secrets.env"
[ -z "$SEND" ] || to_hosts all "${send[@]}" "$ON_HOST/"
on_hosts all "set -eu
cd $ON_HOST
[ ! -f secrets.env ] || chmod 600 secrets.env
$unpack
ln -sfn src/configs configs
export PATH=\"\$HOME/.local/bin:\$PATH\"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d venv ] || uv venv --quiet --seed --python $(quote "$PYTHON") venv
venv/bin/pip install --quiet $(quote "./src[$EXTRAS]")
timeout 300 venv/bin/python -c 'import jax; print(jax.process_index(), jax.local_devices())'"
