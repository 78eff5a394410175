# Note: the VMs' service account needs roles/storage.objectUser on gs://my-bucket; keep the bucket in the machines' region

# ==== once, before the launch
# prepare the data
t5x-like prepare ul2:ul2_20b --data.store-dir gs://my-bucket/t5x-like/stores

# ==== launch (run by --execute)
# request the slices
gcloud compute tpus queued-resources create ul2-20b \
  --zone=us-west4-a \
  --node-count=2 \
  --node-prefix=ul2-20b \
  --accelerator-type=v5litepod-256 \
  --runtime-version=v2-alpha-tpuv5-lite \
  --reserved \
  --valid-until-duration=12h
# wait for the slices
until [ "$(gcloud compute tpus queued-resources describe ul2-20b --zone=us-west4-a '--format=value(state.state)')" = ACTIVE ]; do sleep 30; done
# pack the source
tar \
  --create \
  --gzip \
  --file=launch/examples/tpu-vm-multislice/source.tar.gz \
  '--exclude=./.[!.]*' \
  --exclude=./runs \
  --exclude=./build \
  --exclude=./dist \
  --exclude=__pycache__ \
  --directory=. .
# create a directory on all workers
gcloud compute tpus queued-resources ssh ul2-20b \
  --node=all \
  --worker=all \
  --zone=us-west4-a \
  '--command=mkdir -p ul2-20b'
# copy to all workers
gcloud compute tpus queued-resources scp launch/examples/tpu-vm-multislice/setup.sh launch/examples/tpu-vm-multislice/run.sh launch/examples/tpu-vm-multislice/source.tar.gz ul2-20b:ul2-20b/ \
  --node=all \
  --worker=all \
  --zone=us-west4-a
# install on all workers
gcloud compute tpus queued-resources ssh ul2-20b \
  --node=all \
  --worker=all \
  --zone=us-west4-a \
  '--command=bash ul2-20b/setup.sh'
# start on all workers
gcloud compute tpus queued-resources ssh ul2-20b \
  --node=all \
  --worker=all \
  --zone=us-west4-a \
  '--command=bash -c '"'"'setsid --fork bash ul2-20b/run.sh >>ul2-20b/log.txt 2>&1 </dev/null'"'"''

# ==== follow
# show the logs of all workers
gcloud compute tpus queued-resources ssh ul2-20b \
  --node=all \
  --worker=all \
  --zone=us-west4-a \
  '--command=tail --lines=+1 --follow=name ul2-20b/log.txt'

# ==== stop and clean up
# save and stop without a restart
gcloud compute tpus queued-resources ssh ul2-20b \
  --node=all \
  --worker=all \
  --zone=us-west4-a \
  '--command=pkill --signal TERM --pidfile ul2-20b/pid'
# delete the VMs
gcloud compute tpus queued-resources delete ul2-20b --zone=us-west4-a --force --quiet
