#!/bin/sh
# Set up a database and its accounts: a wrapper of `contextuate-persist setup`, which does the work.
#     ./setup.sh mysql | postgresql | both | docker-mysql | docker-postgresql | docker-both | help
set -eu

case "${1:-help}" in
    help) set -- --help ;;
esac
if command -v contextuate-persist >/dev/null 2>&1; then
    exec contextuate-persist setup "$@"
fi
for python in "${PYTHON:-python3}" "$(dirname "$0")/../.venv/bin/python"; do
    if "$python" -c 'import contextuate_persist' >/dev/null 2>&1; then
        exec "$python" -m contextuate_persist setup "$@"
    fi
done
echo "contextuate-persist is not installed: pip install 'contextuate-persist[binary]'" >&2
exit 1
