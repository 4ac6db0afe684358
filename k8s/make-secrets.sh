#!/bin/sh
# Writes the files of the Secrets into k8s/base/secrets (or the directory given): random keys and passwords, one token,
# and a certificate of an authority of its own. What is there already stays: put your own certificate there first.
set -eu
umask 077
place=${1:-$(dirname "$0")/base/secrets}
name=${2:-understudy.understudy.svc}
mkdir -p "$place"
cd "$place"
for key in wire_key store_key prefix-password gcs-password; do
  [ -s $key ] || openssl rand -hex 32 | tr -d '\n' > $key
done
[ -s tokens ] || echo "$(openssl rand -hex 32) everybody" > tokens
if [ ! -s tls.crt ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 \
    -subj "/CN=understudy-ca" -keyout ca.key -out ca.crt 2>/dev/null
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$name" \
    -addext "subjectAltName=DNS:$name,DNS:$name.cluster.local,DNS:localhost,IP:127.0.0.1" \
    -keyout tls.key -out tls.csr 2>/dev/null
  openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 \
    -copy_extensions copy -out tls.crt 2>/dev/null
  rm -f tls.csr ca.srl
fi
echo "in $place:" *
