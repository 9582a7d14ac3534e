#!/bin/sh
# Make sure that Fashion-MNIST is on this machine: from what is there, from its own host, or from Debian's package.
# Usage: get_data.sh PYTHON. Needs no root.
set -eu
python=$1

if "$python" -m fashion_jax.data; then
    exit 0
fi
command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || exit 1

echo "nothing to do about that yet: fetching Debian's package dataset-fashion-mnist, which holds the same files" >&2
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fashion_jax
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
cd "$work"
mkdir -p lists/partial archives/partial
apt="apt-get -q -o Dir::State::Lists=$work/lists -o Dir::Cache=$work -o APT::Sandbox::User=$(id -un) -o Debug::NoLocking=1"
$apt update >&2
$apt download dataset-fashion-mnist >&2
dpkg-deb -x dataset-fashion-mnist_*.deb unpacked
mkdir -p "$cache"
for file in unpacked/usr/share/datasets/fashion-mnist/*.gz; do
    cp "$file" "$cache/.$(basename "$file").part"
    mv "$cache/.$(basename "$file").part" "$cache/$(basename "$file")"
done
cd - >/dev/null
exec "$python" -m fashion_jax.data
