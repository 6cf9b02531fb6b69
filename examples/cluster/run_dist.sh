#!/usr/bin/env bash
# Cuts a graph here, brings each host its share, and trains on all of them.
#
#   HOSTS=hosts.txt WORKSPACE=/data/run PYTHON=/opt/venv/bin/python examples/cluster/run_dist.sh --epochs 20
#
# What follows the script's name is handed to train_full_graph.py. The network between the hosts must be trusted or
# tunnelled: what workers say to each other is neither authenticated nor encrypted.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

hosts="${HOSTS:-$here/hosts.txt}"
workspace="${WORKSPACE:-partpar-run}"
python="${PYTHON:-python3}" # at the far end; partpar is installed there
dataset="${DATASET:-planted}"
per_host="${NPROC_PER_NODE:-1}"
ssh=(--connect-timeout "${CONNECT_TIMEOUT:-10}")
if [[ -n "${SSH_CONFIG:-}" ]]; then
    ssh+=(--ssh-config "$SSH_CONFIG")
fi

num_hosts="$(grep --count --extended-regexp '^[[:space:]]*[^#[:space:]]' "$hosts")"
num_parts=$((num_hosts * per_host))
root="partitions/$dataset"

partpar partition "$root" --dataset "$dataset" --num-parts "$num_parts"
partpar copy --hosts "$hosts" "${ssh[@]}" --workspace "$workspace" --part-root "$root/metis_$num_parts" \
    --rel-data-path "$root" --with "$here/../train_full_graph.py"
exec partpar launch --hosts "$hosts" "${ssh[@]}" --workspace "$workspace" --nproc-per-node "$per_host" \
    --python "$python" --port "${PORT:-29500}" --allow-remote -- train_full_graph.py --dataset "$dataset" "$@"
