# Note: the working directory, the recipe and the run's directory must be the same files on all nodes
# Note: sbatch hands on HF_TOKEN, a secret, from the shell that calls it

# ==== launch: what --execute runs
# hand it to the scheduler
sbatch launch/examples/slurm/train.sbatch

# ==== follow
# where it stands
squeue --me --name=ul2-20b

# ==== stop and clean up
# save and leave; it is started again
scancel --signal=TERM --name=ul2-20b --me
# end it for good
scancel --name=ul2-20b --me
