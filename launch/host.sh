#!/usr/bin/env bash
# What tpu.sh runs on every host of a TPU; nothing to call by hand. Everything lies in ~/almost_jax:
# source/ (the files sent), venv/, runs/ (results; source/runs leads there) and job/ (the command's log, pid, exit code).
set -euo pipefail

home=$HOME/almost_jax
job=$home/job
save_seconds=${ALMOST_SAVE_SECONDS:-300}

die() {
  printf 'host.sh on %s: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

# The command's process holds this lock from its start to its end, so a process id that was given out again, after a
# reboot say, can't be taken for it.
running() { [[ -e $job/lock ]] && ! flock --shared --nonblock "$job/lock" true; }

state() {
  if [[ ! -e $home/ready ]]; then
    echo absent
  elif running; then
    echo running
  elif [[ ! -e $job/exit ]]; then
    echo stopped
  elif [[ $(<"$job/exit") == 0 ]]; then
    echo finished
  else
    echo failed
  fi
}

# Several hosts of one run read and write the same runs.
share() {
  ! mountpoint --quiet "$home/runs" || return 0
  command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
  sudo mount -t nfs -o hard,nofail "$1" "$home/runs"
  sudo chown "$(id -u)" "$home/runs"
}

# Cloud Storage FUSE from Google's repository. A host that was just made may hold apt's lock for its own updates.
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc place=https://packages.cloud.google.com/apt
  sudo curl --fail --silent --show-error --location --output "$key" "$place/doc/apt-key.gpg"
  printf 'deb [signed-by=%s] %s gcsfuse-%s main\n' "$key" "$place" "$(lsb_release --codename --short)" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet
  sudo apt-get install --yes --quiet -o DPkg::Lock::Timeout=300 gcsfuse
}

# COMMAND...: a call of gcsfuse, whose last word is the folder. A bucket that is mounted there stays.
mount_bucket() {
  local folder=${!#}
  ! mountpoint --quiet "$folder" || return 0
  command -v gcsfuse >/dev/null || install_gcsfuse
  # A mount whose process died is still in the way.
  ! grep -qs " $folder fuse" /proc/mounts || fusermount -u "$folder"
  sudo install -d -o "$(id -un)" "$folder"
  "$@"
}

setup() {
  ! running || die "a command runs here"
  rm -f "$home/ready"
  mkdir -p "$home/runs" "$job"
  [[ -z ${1:-} ]] || share "$1"
  ln -sfn "$home/runs" "$home/source/runs"
  # The images bring Python 3.10; uv brings the one that is needed.
  python3 -m pip install --user --quiet uv
  [[ -x $home/venv/bin/python ]] || python3 -m uv venv --quiet --python 3.11 "$home/venv"
  python3 -m uv pip install --quiet --python "$home/venv/bin/python" -e "$home/source[tpu]"
  touch "$home/ready"
}

start() {
  [[ -e $home/ready ]] || die "not set up yet"
  exec 9>>"$job/lock"
  flock --timeout 5 9 || die "a command runs here already"
  rm -f "$job/exit"
  # It keeps descriptor 9, and with it the lock, when this script ends.
  setsid bash "${BASH_SOURCE[0]}" job "$@" >>"$job/log" 2>&1 </dev/null &
  echo $! >"$job/pid"
}

job() {
  local code=0
  cd "$home/source"
  printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$*"
  env "PATH=$home/venv/bin:$PATH" "$@" || code=$?
  printf '== %s: exit code %s\n' "$(date -u +%FT%TZ)" "$code"
  echo "$code" >"$job/exit"
}

stop() {
  ! running || kill -- "-$(<"$job/pid")" || true
  # JAX takes the signal as a notice of preemption and goes on.
  for ((tries = 0; tries < 10; tries++)); do
    running || return 0
    sleep 0.5
  done
  kill -KILL -- "-$(<"$job/pid")" || true
}

logs() {
  [[ -e $job/log ]] || die "nothing was started here yet"
  if running; then
    tail -n +1 -f --pid="$(<"$job/pid")" "$job/log"
  else
    cat "$job/log"
  fi
  [[ $(state) == finished ]]
}

# Brings the results of earlier hosts here, once: later the ones here are the newer ones.
restore() {
  if [[ -e $job/bucket ]]; then
    [[ $(<"$job/bucket") == "$1" ]] || die "the runs here are saved to $(<"$job/bucket"), not to $1"
    return
  fi
  [[ -z $(ls -A "$home/runs") ]] || die "there are runs here that no bucket has; fetch them, delete them, then start with $1"
  rm -rf "$home/restoring"
  mkdir "$home/restoring"
  gcloud storage rsync "$1" "$home/restoring" --recursive
  rm -rf "$home/runs"
  mv "$home/restoring" "$home/runs"
  echo "$1" >"$job/bucket"
}

save() { setsid bash "${BASH_SOURCE[0]}" saving "$1" >>"$job/save.log" 2>&1 </dev/null & }

# Copies the runs to the bucket until a copy was made after the command's end. What a stage deleted is deleted there too,
# or it would come back with the next host.
saving() {
  exec 8>"$job/save.lock"
  flock 8
  [[ $(<"$job/bucket") == "$1" ]] || die "the runs here are saved to $(<"$job/bucket"), not to $1"
  local before
  while true; do
    before=$(state)
    if gcloud storage rsync "$home/runs" "$1" --recursive --delete-unmatched-destination-objects &&
      [[ $before != running ]]; then
      return
    fi
    for ((waited = 0; waited < save_seconds; waited++)); do
      [[ $before != running ]] || running || break
      sleep 1
    done
  done
}

case ${1:-} in
  setup | mount_bucket | state | start | job | stop | logs | restore | save | saving) "$@" ;;
  *) die "unknown verb '${1:-}'" ;;
esac
