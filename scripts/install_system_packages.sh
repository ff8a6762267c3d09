#!/bin/sh
# Installs the system packages that the tests need and that are missing, with apt, as root or with passwordless sudo.
# Where it cannot, it prints the command and goes on: the tests that need the packages are then left out.
# usage: install_system_packages.sh
set -u

# g++, Python.h and make compile DeepSpeed's ops; libaio is for those that read and write NVMe; the reports are tested in a
# browser; launches across hosts and Slurm jobs are run for real.
packages="g++ make python3-dev python3-venv libaio-dev chromium fonts-liberation
    openssh-server openssh-client pdsh iproute2 slurm-wlm munge"

if ! command -v dpkg-query >/dev/null 2>&1 || ! command -v apt-get >/dev/null 2>&1; then
    echo "note: this system has no apt; install what corresponds to these Debian packages:" $packages >&2
    exit 0
fi
missing=""
for package in $packages; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
        missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -eq 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    as_root="no"
fi
if [ "$as_root" != no ]; then
    echo "installing system packages:$missing" >&2
    # Lists may be old or of repositories that are gone; only the packages matter.
    $as_root apt-get update -qq ||:
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null && exit 0
fi
echo "note: these system packages are missing, and the tests that need them are left out:$missing" >&2
echo "note: install them: sudo apt-get install --yes --no-install-recommends$missing" >&2
exit 0
