#!/usr/bin/env bash
# Writes the stubs of proto/ to understudy/v1/, or checks that the committed ones match.
# The generator is an old one on purpose: what it writes runs under every protobuf from 4.25 on, so that
# clients need not have the newest. It lives in an environment of its own, .venv-proto/.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TOOLS=.venv-proto
PIN="grpcio-tools==1.62.3"

if [ "$(cat "$TOOLS/.pin" 2>/dev/null)" != "$PIN" ]; then
  rm -rf "$TOOLS"
  "$PYTHON" -m venv "$TOOLS"
  "$TOOLS/bin/pip" install --quiet --disable-pip-version-check "$PIN" "setuptools<81"
  echo "$PIN" > "$TOOLS/.pin"
fi

generate() {
  "$TOOLS/bin/python" -W ignore -m grpc_tools.protoc -Iproto --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" \
    proto/understudy/v1/*.proto
}

case "${1:-}" in
  write)
    generate .
    ;;
  check)
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    diff -ru --exclude=__init__.py --exclude=__pycache__ "$fresh/understudy/v1" understudy/v1 >&2 || {
      echo "error: understudy/v1 does not match proto/; run 'make proto' and commit what it writes" >&2
      exit 1
    }
    ;;
  *)
    echo "usage: tools/proto.sh write|check" >&2
    exit 2
    ;;
esac
