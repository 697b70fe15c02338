#!/usr/bin/env bash
# Three Ray nodes on this machine, for trying out what several machines would do. Ends them, and nothing else, at the end.
#
#   cluster/local/three_nodes.sh                              until Ctrl-C
#   cluster/local/three_nodes.sh rlalign submit my_run.yaml   as long as the command takes
set -euo pipefail

cpus=${CPUS_PER_NODE:-2}
address=
stop() {
  trap - EXIT
  if [[ -n $address ]]; then rlalign cluster stop --address "$address"; fi
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

started=$(rlalign cluster start --num-cpus "$cpus")
echo "$started"
address=$(awk '$1 == "head" {print $2}' <<<"$started")
dashboard=$(awk '$1 == "dashboard" {print $2}' <<<"$started")
for _ in 1 2; do
  rlalign cluster start --address "$address" --num-cpus "$cpus"
done
rlalign cluster wait --address "$address" --nodes 3 --timeout 120

export RAY_ADDRESS=$address RAY_API_SERVER_ADDRESS=$dashboard
if [[ $# -gt 0 ]]; then
  "$@"
else
  echo "Ctrl-C ends the cluster"
  while sleep 3600; do :; done
fi
