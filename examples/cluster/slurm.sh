#!/bin/bash
# A study on the nodes of a Slurm job: `sbatch examples/cluster/slurm.sh STUDY RUN_FOLDER`, from the folder that holds
# the study. The first node runs the cluster's head and the command, and it alone writes the run. All nodes need the
# environment and the data, under the same paths. See docs/how-to/cluster.md.
#SBATCH --job-name=mpsearch
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
set -euo pipefail
study=$1 run=$2
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# All that reaches the cluster's port must know this secret; srun hands the environment to every node.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
port=${RAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
start() { # on one node, and stay for as long as the step
  srun --nodes=1 --ntasks=1 --overlap "$1" ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" "${@:2}" &
}
start --nodelist="$head" --head --port="$port" --include-dashboard=false --disable-usage-stats
for _ in $(seq 60); do (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null && break; sleep 1; done
for node in "${nodes[@]:1}"; do
  start --nodelist="$node" --address="$head:$port"
done

command=(run "$study" --out "$run")
[ -e "$run/run.json" ] && command=(resume "$run") # requeued, or submitted again: nothing is lost
mpsearch "${command[@]}" --set engine.address="$head:$port" --set search.concurrency="$SLURM_JOB_NUM_NODES"
