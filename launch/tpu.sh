#!/usr/bin/env bash
# Cloud TPU VMs from your own machine, through gcloud. README.md beside this file says how the verbs go together.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/tpu.sh VERB NAME --zone ZONE [options] [-- COMMAND...]

  create   ask for a TPU: a queued resource and its node, both called NAME   --type TYPE [--runtime VERSION] [--spot]
  setup    wait until it is there, send the committed files, install them on every host
                                                                [--share SERVER:/EXPORT] [--mount gs://BUCKET]
  run      start COMMAND on every host and return                            [--bucket gs://BUCKET/FOLDER]
  logs     show a host's output and follow it until COMMAND ends             [--worker NUMBER]
  resume   bring COMMAND back, on a new TPU where the old one is gone        (the options of create, setup, run)
  fetch    copy the runs to DIR/runs                                         [--to DIR] [--bucket gs://BUCKET/FOLDER]
  delete   delete the TPU, its disks and its queued resource

everywhere: --project PROJECT, and --dry-run, which prints the commands and changes nothing
--share: a file system (NFS, a Filestore say) that every host mounts as its runs; a run on several hosts needs one
--mount: a bucket that every host mounts with Cloud Storage FUSE at /gcs/BUCKET, where almost-jax finds gs://BUCKET/...
END
}

say() { printf 'tpu.sh: %s\n' "$*" >&2; }
die() { say "$@"; exit 2; }

# The words as a shell would need to read them.
quoted() {
  local word text=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  printf '%s' "${text:1}"
}

# Everything that changes something goes through here.
call() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
    return
  fi
  local code=0
  "$@" || code=$?
  ((code == 0)) || die "exit code $code from: $(quoted "$@")"
}

# The line that runs host.sh with some arguments on a host.
on_host() { printf 'bash almost_jax/source/launch/host.sh %s' "$(quoted "$@")"; }

ssh_command() { # WORKER LINE: leaves the command in `words`
  words=(gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2")
}

remote() { # WORKER ARGUMENTS OF host.sh...
  local words worker=$1
  shift
  ssh_command "$worker" "$(on_host "$@")"
  call "${words[@]}"
}

# The state of the queued resource, NONE when there is no such thing. Only reads.
state() {
  local words=(gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)") answer
  if answer=$("${words[@]}" 2>&1); then
    grep -Exm1 '[A-Z_]+' <<<"$answer" || die "no state in the answer of: $(quoted "${words[@]}")"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    printf '%s\n' "$answer" >&2
    die "can't tell the state of $name; failed: $(quoted "${words[@]}")"
  fi
}

wait_until_active() {
  if [[ $dry_run ]]; then
    printf '# every %s s until it answers ACTIVE:\n' "$poll_seconds"
    call gcloud compute tpus queued-resources describe "$name" "${place[@]}" "--format=value(state.state)"
    return
  fi
  local now seen=""
  while true; do
    now=$(state)
    [[ $now == "$seen" ]] || say "$name is $now"
    case $now in
      ACTIVE) return ;;
      CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) ;;
      NONE) die "there is no $name in $zone; create it first" ;;
      *) die "$name will not become ACTIVE any more; resume makes a new one, delete clears it away" ;;
    esac
    seen=$now
    sleep "$poll_seconds"
  done
}

create() {
  call gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${spot:+--spot}
}

setup() {
  local archive=$root/build/almost_jax.tar.gz words
  wait_until_active
  [[ -z $(git -C "$root" status --porcelain 2>/dev/null) ]] || say "note: only what is committed is sent; there is more"
  call mkdir -p "$root/build"
  call git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all
  ssh_command all "rm -rf almost_jax/source && mkdir -p almost_jax/source \
&& tar -xzf almost_jax.tar.gz -C almost_jax/source && $(on_host setup ${share:+"$share"})"
  call "${words[@]}"
  mount_bucket
}

# The options are those of almost_jax/io/paths.py, which says what they are for.
mount_bucket() {
  [[ $mount ]] || return 0
  remote all mount_bucket gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "${mount#gs://}" "/gcs/${mount#gs://}"
  [[ $dry_run ]] || return 0
  printf '# which is on a host, by host.sh:\n'
  sed -n '/^install_gcsfuse()/,/^}/s/^/#   /p; /^mount_bucket()/,/^}/s/^/#   /p' "$root/launch/host.sh"
}

start() {
  if [[ $bucket ]]; then
    # An object of its own, so that the folder exists and a failing copy from it is always an error.
    call gcloud storage cp "$root/launch/bucket.txt" "$bucket/bucket.txt"
    remote all restore "$bucket"
  fi
  remote all start "${command[@]}"
  if [[ $bucket ]]; then remote 0 save "$bucket"; fi
}

logs() {
  local words
  ssh_command "$worker" "$(on_host logs)"
  if [[ $dry_run ]]; then
    call "${words[@]}"
  else
    "${words[@]}" || die "host $worker can't be reached, or what it ran ended badly (its output is above)"
  fi
}

# What to do depends on how things stand, so a dry run asks for that too; asking changes nothing.
resume() {
  local words states now
  now=$(state)
  case $now in
    ACTIVE)
      # The file is missing where set-up never came that far.
      ssh_command all "if [ -e almost_jax/source/launch/host.sh ]; then $(on_host state); else echo absent; fi"
      states=$("${words[@]}") || die "failed: $(quoted "${words[@]}")"
      case $(sort -u <<<"$states") in
        running | finished)
          say "the command on every host of $name: ${states%%$'\n'*}; nothing to do"
          return
          ;;
        *absent*) setup ;;
        # One process gone stops the whole: the others hang or go down with it.
        *)
          remote all stop
          # A host that was started again has lost it.
          mount_bucket
          ;;
      esac
      ;;
    CREATING | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) setup ;;
    NONE)
      create
      setup
      ;;
    SUSPENDING | SUSPENDED | FAILED)
      delete
      create
      setup
      ;;
    *) die "$name is $now; try again in a minute" ;;
  esac
  start
}

fetch() {
  call mkdir -p "$to/runs"
  if [[ $bucket ]]; then
    call gcloud storage rsync "$bucket" "$to/runs" --recursive
  else
    call gcloud compute tpus tpu-vm scp "$name:almost_jax/runs" "$to" "${place[@]}" --worker=0 --recurse
  fi
}

delete() { call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force; }

needs() { # OPTION VALUE: what the verb can't do without
  [[ $2 ]] || die "$verb needs $1; launch/tpu.sh --help shows the verbs"
}

[[ ${1:-} != --help && ${1:-} != -h ]] || { usage; exit 0; }
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll_seconds=${ALMOST_POLL_SECONDS:-30}
verb=${1:-} name=${2:-} zone="" project="" type="" runtime="" spot="" bucket="" share="" mount="" worker=0 to=. dry_run="" command=()
case $verb in
  create | setup | run | logs | resume | fetch | delete) ;;
  *) die "the verb is one of create, setup, run, logs, resume, fetch, delete, not '$verb'; see launch/tpu.sh --help" ;;
esac
[[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
  die "$verb needs a NAME of small letters, digits and hyphens next, not '$name'"
shift 2
while (($#)); do
  case $1 in
    --dry-run) dry_run=yes ;;
    --spot) spot=yes ;;
    --zone | --project | --type | --runtime | --bucket | --share | --mount | --worker | --to)
      [[ ${2:-} && ${2:-} != --* ]] || die "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --)
      command=("${@:2}")
      break
      ;;
    *) die "unknown option '$1'; the command to run comes after --" ;;
  esac
  shift
done

needs --zone "$zone"
case $verb in
  create | resume)
    needs --type "$type"
    case $type in
      v5litepod-*) default_runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) default_runtime=v2-alpha-tpuv5 ;;
      v6e-*) default_runtime=v2-alpha-tpuv6e ;;
      v[234]-*) default_runtime=tpu-ubuntu2204-base ;;
      *) default_runtime="" ;;
    esac
    runtime=${runtime:-$default_runtime}
    [[ $runtime ]] ||
      die "--type '$type' is not known here (v4-32, v5litepod-8, v5p-16, v6e-8 are such types); give --runtime too"
    ;;
esac
case $verb in
  run | resume) needs "a command after --" "${command[*]}" ;;
  *) ((${#command[@]} == 0)) || die "$verb takes no command" ;;
esac
[[ -z $bucket || $bucket =~ ^gs://[^/]+/.*[^/]$ ]] ||
  die "--bucket '$bucket' should be gs://BUCKET/FOLDER: a folder of this TPU's own, no slash at the end"
[[ -z $share || $share =~ ^[^:/]+:/. ]] || die "--share '$share' should be SERVER:/EXPORT, as a Filestore names it"
[[ -z $mount || $mount =~ ^gs://[a-z0-9][a-z0-9._-]*$ ]] ||
  die "--mount '$mount' should be gs://BUCKET, a whole bucket: what lies in it is then found as gs://BUCKET/..."
[[ -z $share || -z $bucket ]] || die "give --share or --bucket: what hosts share outlives them and needs no copies"
[[ $worker =~ ^[0-9]+$ ]] || die "--worker '$worker' should be a host's number, from 0"
[[ $dry_run && $verb != resume ]] || command -v gcloud >/dev/null ||
  die "gcloud is missing: https://cloud.google.com/sdk/docs/install"
place=("--zone=$zone" ${project:+"--project=$project"} --quiet)

case $verb in
  run) start ;;
  *) "$verb" ;;
esac
