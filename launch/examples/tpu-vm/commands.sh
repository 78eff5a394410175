# Note: the VMs' service account needs roles/storage.objectUser on gs://my-bucket; keep the bucket in the machines' region
# Note: HF_TOKEN is read from Secret Manager on each worker

# ==== once, before the launch
# prepare the data
t5x-like prepare ul2:ul2_20b --data.store-dir gs://my-bucket/t5x-like/stores

# ==== launch (run by --execute)
# create the slice
gcloud compute tpus tpu-vm create ul2-20b \
  --zone=us-east5-a \
  --accelerator-type=v5p-128 \
  --version=v2-alpha-tpuv5 \
  --spot
# pack the source
tar \
  --create \
  --gzip \
  --file=launch/examples/tpu-vm/source.tar.gz \
  '--exclude=./.[!.]*' \
  --exclude=./runs \
  --exclude=./build \
  --exclude=./dist \
  --exclude=__pycache__ \
  --directory=. .
# create a directory on all workers
gcloud compute tpus tpu-vm ssh ul2-20b --worker=all --zone=us-east5-a '--command=mkdir -p ul2-20b'
# copy to all workers
gcloud compute tpus tpu-vm scp launch/examples/tpu-vm/setup.sh launch/examples/tpu-vm/run.sh launch/examples/tpu-vm/source.tar.gz ul2-20b:ul2-20b/ \
  --worker=all \
  --zone=us-east5-a
# install on all workers
gcloud compute tpus tpu-vm ssh ul2-20b --worker=all --zone=us-east5-a '--command=bash ul2-20b/setup.sh'
# start on all workers
gcloud compute tpus tpu-vm ssh ul2-20b \
  --worker=all \
  --zone=us-east5-a \
  '--command=bash -c '"'"'setsid --fork bash ul2-20b/run.sh >>ul2-20b/log.txt 2>&1 </dev/null'"'"''

# ==== follow
# show the logs of all workers
gcloud compute tpus tpu-vm ssh ul2-20b \
  --worker=all \
  --zone=us-east5-a \
  '--command=tail --lines=+1 --follow=name ul2-20b/log.txt'

# ==== stop and clean up
# save and stop without a restart
gcloud compute tpus tpu-vm ssh ul2-20b \
  --worker=all \
  --zone=us-east5-a \
  '--command=pkill --signal TERM --pidfile ul2-20b/pid'
# delete the VMs
gcloud compute tpus tpu-vm delete ul2-20b --zone=us-east5-a --quiet
