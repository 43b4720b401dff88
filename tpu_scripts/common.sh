#!/usr/bin/env bash
# Helpers that every script here sources: options, checks, and `run`, which prints a command or runs it.
# shellcheck disable=SC2034  # some variables are read by the scripts alone
set -euo pipefail

ON_HOST=mpd-jax  # the directory under the home of every host; all that these scripts write there is in it
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DRY_RUN=         # not empty: print every command, run none

die() { # a mistake of the caller's
  echo "error: $*" >&2
  exit 2
}

fail() { # the other side said no
  echo "error: $*" >&2
  exit 1
}

help() { # the head of the calling script: what it does, and its variables with their defaults
  sed -n '2,/^\. /{/^\. /d; /^# shellcheck/d; s/^# \{0,1\}//; p;}' "$0"
}

option() { # options that all scripts have; anything else is a mistake
  case $1 in
    -h | --help) help && exit 0 ;;
    --dry-run) DRY_RUN=yes ;;
    *) die "unknown option or argument '$1'; $(basename "$0") --help lists what there is" ;;
  esac
}

settings() { # what stands behind CONFIG changes it; an option there would be mpd-jax train's, --dry-run too
  local word
  for word in "${@:2}"; do
    [[ $word != -* ]] || die "$word stands behind CONFIG; options of $(basename "$0") go before it"
  done
}

need() { # need NAME MEANING
  [ -n "${!1:-}" ] || die "$1 is not set; set it to $2, as in $1=... $(basename "$0")"
}

quote() { # words as a shell reads them back
  local word line='' inner=\'\\\'\'
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/$inner}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

run() {
  if [ -n "$DRY_RUN" ]; then
    quote "$@"
    return
  fi
  echo "+ $(quote "$@")" >&2
  command -v "$1" >/dev/null || fail "$1 is not installed (README.md names what each script needs)"
  "$@" || fail "$1 ended with exit code $?; its message is above"
}

need_tpu() { # sets `where`, the arguments that place a slice
  need TPU_NAME "the name of the slice"
  need ZONE "the zone of the slice, such as us-east5-b"
  where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
}

on_hosts() { # on_hosts WORKER COMMAND: on one host of the slice (0, 1, ...) or on all of them
  run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

to_hosts() { # to_hosts WORKER FILE... DESTINATION
  local worker=$1
  shift
  run gcloud compute tpus tpu-vm scp "${@:1:$#-1}" "$TPU_NAME:${!#}" "${where[@]}" --worker="$worker" --recurse
}

check_secrets() { # SECRETS_FILE holds lines NAME=value; it is copied as a file and is on no command line
  [ -z "$SECRETS_FILE" ] && return
  [ -f "$SECRETS_FILE" ] || die "SECRETS_FILE: no file $SECRETS_FILE"
  [ -z "$(find -L "$SECRETS_FILE" \( -perm -g+r -o -perm -o+r \))" ] ||
    die "SECRETS_FILE: others can read $SECRETS_FILE; chmod 600 it"
  ! grep -Eqv '^(#.*|[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_./:@%+,=-]*|)$' "$SECRETS_FILE" ||
    die "SECRETS_FILE: a line of $SECRETS_FILE is not NAME=value, without quotes, spaces and export"
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash 4.4 or newer is needed, and this is $BASH_VERSION"
