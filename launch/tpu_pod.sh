#!/usr/bin/env bash
# A run on a slice of Cloud TPUs: makes the slice, copies the checkout to all of its hosts, runs the
# same command on each, and deletes the slice when the run has ended.
#
#   NAME=kd ZONE=us-west4-a TYPE=v5litepod-16 WORKDIR=gs://BUCKET/runs/wikitext \
#     launch/tpu_pod.sh --config=configs/pretrain_wikitext.py
#
# Run it from the checkout, with `gcloud` logged in; what is committed (HEAD) is copied. WORKDIR
# must be gs://..., since the hosts share no disk; the slice's service account must be able to
# write there. Arguments go to kd_jax.main.
# `python -m kd_jax.plan --config=... --topology=v5e:4x4` tells beforehand whether a run fits.
#
# Resume: run the same command again. It happens by itself where a spot slice is taken away: the
# slice is made anew and the run continues from its last checkpoint. An error of the run itself ends
# the script and leaves the slice for a look; delete it with
#   gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE
set -euo pipefail

: "${NAME:?set NAME to a name for the slice}"
: "${ZONE:?set ZONE, for instance us-west4-a}"
: "${TYPE:?set TYPE, for instance v5litepod-16}"
: "${WORKDIR:?set WORKDIR to gs://BUCKET/...}"
IMAGE=${IMAGE:-v2-alpha-tpuv5-lite} # `gcloud compute tpus versions list --zone=$ZONE` lists them
SPOT=${SPOT---spot}                 # SPOT= for a slice that is not taken away

tpu() {
  local verb=$1
  shift
  gcloud compute tpus tpu-vm "$verb" "$NAME" --zone="$ZONE" "$@"
}
state() {
  tpu describe --format='value(state)' 2>/dev/null || echo MISSING
}
on_all_hosts() {
  tpu ssh --worker=all --command="$1"
}

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD

prepare() { # the images' own Python is older than JAX wants, so uv brings one
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:kd_jax.tar.gz" --zone="$ZONE" --worker=all
  on_all_hosts "mkdir -p kd_jax && tar -xzf kd_jax.tar.gz -C kd_jax &&
    curl -LsSf https://astral.sh/uv/install.sh | sh && PATH=\$HOME/.local/bin:\$PATH &&
    uv venv --clear --python 3.12 venv && uv pip install -q -p venv './kd_jax[tpu,gcs]'"
}

# JAX finds the hosts of the slice itself. `exec` lets SIGTERM reach Python, which saves and leaves.
arguments=$(printf '%q ' "--workdir=$WORKDIR" "$@")
command="cd kd_jax && exec ../venv/bin/python -m kd_jax.main $arguments"

while true; do
  case $(state) in
    READY) ;;
    MISSING)
      # No capacity: ask again.
      tpu create --accelerator-type="$TYPE" --version="$IMAGE" $SPOT || { sleep 60; continue; }
      ;;
    CREATING | STARTING | RESTARTING | DELETING)
      sleep 20
      continue
      ;;
    *) # PREEMPTED, STOPPED, ...
      tpu delete --quiet
      continue
      ;;
  esac
  if prepare && on_all_hosts "$command"; then
    tpu delete --quiet
    exit 0
  fi
  sleep 60 # the state of a slice that was taken away changes a little later
  if [[ $(state) == READY ]]; then
    echo "the run failed on a slice that is still there: see above" >&2
    exit 1
  fi
done
