#!/bin/sh
# Make sure that Fashion-MNIST is on this machine, if need be from Debian's package. Needs no root.
# Usage: get_data.sh PYTHON
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

status=0
"$1" -m fashion_jax.data 2>"$work/log" || status=$?
if ! { grep -q '^error: no Fashion-MNIST' "$work/log" && command -v apt-get && command -v dpkg-deb; } >/dev/null; then
    cat "$work/log" >&2
    exit $status
fi

sed -n "s/^error: \(.*\); .*/\1; taking Debian's package dataset-fashion-mnist instead/p" "$work/log" >&2
mkdir -p "$work/lists/partial" "$work/archives/partial"
apt="apt-get -qq -o Dir::State::Lists=$work/lists -o Dir::Cache=$work -o APT::Sandbox::User=$(id -un) -o Debug::NoLocking=1"
if ! (cd "$work" && $apt update && $apt download dataset-fashion-mnist && dpkg-deb -x dataset-*.deb .) >&2; then
    cat "$work/log" >&2
    exit 1
fi
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fashion_jax
mkdir -p "$cache"
for file in "$work"/usr/share/datasets/fashion-mnist/*.gz; do
    name=$(basename "$file" .gz)
    # Whole or absent, however this script ends; unpacked, because that takes most of the time to load them.
    gzip -dc "$file" >"$cache/.$name.part"
    mv "$cache/.$name.part" "$cache/$name"
done
"$1" -m fashion_jax.data
