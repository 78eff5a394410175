# Note: the failure policy needs JobSet 0.10 or newer in the cluster
# Note: the pods' Kubernetes service account (--service-account) needs roles/storage.objectUser on gs://my-bucket; keep the bucket in the machines' region
# Note: the Secret ul2-20b must have the keys HF_TOKEN

# ==== once, before the launch
# prepare the data
t5x-like prepare ul2:ul2_20b --data.store-dir gs://my-bucket/t5x-like/stores
# build the image
docker build \
  --file=launch/Containerfile \
  --build-arg=EXTRA=tpu \
  --tag=us-docker.pkg.dev/my-project/images/t5x-like:1 .
# push the image
docker push us-docker.pkg.dev/my-project/images/t5x-like:1

# ==== launch (run by --execute)
# create the JobSet
kubectl --namespace=default apply --filename=launch/examples/gke/jobset.yaml

# ==== follow
# show the status
kubectl --namespace=default get jobset ul2-20b
# show the pods
kubectl --namespace=default get pods --selector=jobset.sigs.k8s.io/jobset-name=ul2-20b --output=wide
# show the output
kubectl \
  --namespace=default logs \
  --selector=jobset.sigs.k8s.io/jobset-name=ul2-20b \
  --prefix \
  --follow \
  --max-log-requests=16

# ==== stop and clean up
# stop and delete the JobSet
kubectl --namespace=default delete jobset ul2-20b
