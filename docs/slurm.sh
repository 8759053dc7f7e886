#!/bin/bash
# A run over 2 machines with 4 GPUs each: `sbatch docs/slurm.sh finetune DATA --output-dir RUN ...`
# DATA and RUN are on a file system that both machines see.
#SBATCH --job-name=flashtask
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# A process for each task; its rank, how many there are, and the first machine are read from SLURM's variables.
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun --kill-on-bad-exit=1 python -m flashtask "$@" --resume --distributed ddp
code=$?

# Two minutes before the time is over SLURM sends SIGTERM, and each process saves its place and ends with 143.
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
