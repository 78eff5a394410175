# Note: the failure policy needs JobSet 0.10 or newer in the cluster

# ==== once, before
# build the image
docker build \
  --file=launch/Containerfile \
  --build-arg=EXTRA=tpu \
  --tag=us-docker.pkg.dev/my-project/images/t5x-like:1 .
# push it
docker push us-docker.pkg.dev/my-project/images/t5x-like:1

# ==== launch: what --execute runs
# hand it to the cluster
kubectl --namespace=default apply --filename=launch/examples/gke-multislice/jobset.yaml

# ==== follow
# where it stands
kubectl --namespace=default get jobset ul2-20b
# its pods
kubectl --namespace=default get pods --selector=jobset.sigs.k8s.io/jobset-name=ul2-20b --output=wide
# their output
kubectl \
  --namespace=default logs \
  --selector=jobset.sigs.k8s.io/jobset-name=ul2-20b \
  --prefix \
  --follow \
  --max-log-requests=128

# ==== stop and clean up
# end it and delete it
kubectl --namespace=default delete jobset ul2-20b
