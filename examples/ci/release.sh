#!/usr/bin/env bash
# Compile a model, and make the bundle the current release if it passes every gate and is no worse than the last one.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: release.sh [options] MODEL RELEASES VERSION [-- ARGUMENTS OF gpuopt compile]

  MODEL      what `gpuopt compile` takes
  RELEASES   folder of releases: RELEASES/VERSION is a bundle, RELEASES/current a link to the one in use
  VERSION    name of this release; letters, digits, dots, dashes and underscores

  --max-p99-regress SHARE   how much slower than the current release it may be (default 5%)
  --accept-incomparable     release also what cannot be compared with the current release (exit code 16)
  --help                    show this text

Gates are arguments of gpuopt compile:

  release.sh model.pt releases 1.4.0 -- --precision int8 --max-accuracy-drop 0.5% \
      --max-latency p99=5ms --max-engine-size 64MiB

Environment:
  GPUOPT             the command to run (default gpuopt)
  GPUOPT_CACHE_DIR   results of stages and timings of kernels: keep it between runs
  MINISIGN_KEY       secret key file: the manifest, and with it every file, is signed, for `gpuopt check --public-key`
  MINISIGN_PASSWORD  of that key, if it has one

The exit code is that of the first step that fails: gpuopt's own, as 8 for accuracy, 13 for speed, 14 for size, 15 for
a release worse than the current one; or 2 for wrong usage. Then RELEASES/current is what it was, and the report of the
failure lies in RELEASES/VERSION.failed.
TEXT
}

say() { printf 'release.sh: %s\n' "$*" >&2; }

refuse() {
    say "$*"
    exit 2
}

gpuopt_command="${GPUOPT:-gpuopt}"
max_regress=5%
accept_incomparable=no
positional=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help) usage; exit 0 ;;
        --accept-incomparable) accept_incomparable=yes; shift ;;
        --max-p99-regress)
            [ $# -ge 2 ] || refuse "--max-p99-regress needs a share, as 5%"
            max_regress="$2"
            shift 2
            ;;
        --) shift; break ;;
        -*) refuse "unknown option $1; see --help" ;;
        *) positional+=("$1"); shift ;;
    esac
done
if [ "${#positional[@]}" -ne 3 ]; then
    usage >&2
    exit 2
fi
model="${positional[0]}"
releases="${positional[1]}"
version="${positional[2]}"

# The version becomes the name of a folder: nothing that leads out of RELEASES, hides, or is one of the script's own.
[[ "$version" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || refuse "'$version' is no name for a release"
case "$version" in
    current | *.failed | *.candidate | *.compare.md) refuse "'$version' is no name for a release" ;;
esac
mkdir -p -- "$releases"
# Absolute, so that no name can be taken for an option, and the script may be called from anywhere.
releases="$(CDPATH='' cd -- "$releases" && pwd)"
release="$releases/$version"
candidate="$release.candidate"
current="$releases/current"
[ ! -e "$release" ] || refuse "$release is there already: releases do not change, choose another version"
if [ -e "$current" ] && [ ! -L "$current" ]; then
    refuse "$current is not a link"
fi

# One release at a time: two would compare with the same predecessor. The lock goes with the process.
exec 9> "$releases/.lock"
flock --nonblock 9 || refuse "another release is being made in $releases"

# Whatever happens from here, an unfinished candidate does not stay, and current is not touched.
trap 'rm -rf -- "$candidate" "$candidate.failed" "$releases/.current.new"' EXIT
rm -rf -- "$candidate" "$candidate.failed" "$release.failed"

# Step 1: compile. gpuopt writes a bundle only if it passes all its gates, and the report of a failure beside it. Speed
# is measured also without a gate of speed: the next release is compared with this one.
say "compiling $version"
code=0
"$gpuopt_command" compile --benchmark "$@" --output "$candidate" -- "$model" || code=$?
if [ "$code" -ne 0 ]; then
    if [ -d "$candidate.failed" ]; then mv -T -- "$candidate.failed" "$release.failed"; fi
    say "$version is not released: gpuopt compile ended with exit code $code; current stays"
    exit "$code"
fi

# Step 2: no step back. Gates have fixed limits, this one has the current release as its limit.
if [ -L "$current" ]; then
    say "comparing with $(readlink -- "$current")"
    # Not into the bundle, which holds nothing that its manifest does not list.
    comparison="$release.compare.md"
    "$gpuopt_command" compare "$current" "$candidate" \
        --max-p99-regress "$max_regress" --markdown "$comparison" || code=$?
    if [ "$code" -eq 16 ] && [ "$accept_incomparable" = yes ]; then
        say "it cannot be compared with the current release, which is accepted"
        code=0
    fi
    if [ "$code" -ne 0 ]; then
        mv -T -- "$candidate" "$release.failed"
        say "$version is not released: gpuopt compare ended with exit code $code; current stays"
        exit "$code"
    fi
fi

# Step 3: sign the manifest, which has the hash of every other file. The password is no argument: others could read it.
if [ -n "${MINISIGN_KEY:-}" ]; then
    say "signing"
    printf '%s\n' "${MINISIGN_PASSWORD:-}" |
        minisign -S -s "$MINISIGN_KEY" -m "$candidate/manifest.json" || code=$?
    if [ "$code" -ne 0 ]; then
        say "$version is not released: minisign ended with exit code $code; current stays"
        exit "$code"
    fi
fi

# Step 4: publish. A rename is one step: who reads `current` finds the old release or the new one, never none.
mv -T -- "$candidate" "$release"
rm -f -- "$releases/.current.new"
ln -s -- "$version" "$releases/.current.new"
mv -T -f -- "$releases/.current.new" "$current"
say "$version is current"
