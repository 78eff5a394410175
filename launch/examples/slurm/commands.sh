# Note: the working directory, the recipe and the run directory must be on a file system that all nodes share
# Note: the secret HF_TOKEN is read from the environment of the sbatch command

# ==== launch (run by --execute)
# submit the job
sbatch launch/examples/slurm/train.sbatch

# ==== follow
# show the status
squeue --me --name=ul2-20b

# ==== stop and clean up
# save and stop; the job is requeued
scancel --signal=TERM --name=ul2-20b --me
# cancel the job
scancel --name=ul2-20b --me
