#!/usr/bin/env bash
# All tests, with the Python that is named. Those that need services run one after the other, and a third of their time
# is waiting: beside them, where cores are free, runs what only computes. Everything else comes first.
set -uo pipefail
cd "$(dirname "$0")/.."
python=$1
computing=(tests/parity tests/contract)
computing+=(tests/unit/model tests/unit/kernels tests/unit/engine tests/unit/grammar tests/unit/chat tests/unit/k8s)
services=(tests/chaos tests/cluster)
log=$(mktemp)
beside=
end() {
    trap - INT TERM EXIT
    [ -z "$beside" ] || kill "$beside" 2>/dev/null
    rm -f "$log"
}
trap end EXIT
trap 'end; exit 130' INT TERM

# Built once, so that the processes do not all build them.
"$python" -c 'from workers.kernels.build import build; build()' 2>/dev/null
cores=$("$python" -c 'import os; print(min(7, len(getattr(os, "sched_getaffinity", lambda _: [0, 1])(0))))')
failed=0
others=("${computing[@]/#/--ignore=}" "${services[@]/#/--ignore=}")
"$python" -m pytest -n $((cores + 1)) --dist worksteal "${others[@]}" || failed=$?
nice -n 10 "$python" -m pytest -n "$cores" --dist worksteal "${computing[@]}" >"$log" 2>&1 &
beside=$!
"$python" -m pytest "${services[@]}" || failed=$?
wait "$beside" || failed=$?
beside=
cat "$log"
exit "$failed"
