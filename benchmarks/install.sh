#!/bin/sh
# Installs what vmsnap is compared with: restic from Debian's newest stable suite, unpacked beside the system
# (bookworm's own is four years old), and borg and the AWS command line from PyPI, each in a folder of its own. Run as
# root on Debian 12. Does nothing when all is there; says nothing unless it fails.
#
#   VMSNAP_BENCH_CACHE   the cache folder (default /var/cache/vmsnap-bench)
set -eu

cache=${VMSNAP_BENCH_CACHE:-/var/cache/vmsnap-bench}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
borg_version=1.4.5
aws_version=1.46.3
suite=trixie
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

mkdir -p "$cache"
log=$cache/install.log
: >"$log"
trap 'status=$?; [ $status -eq 0 ] || { echo "benchmark install failed ($status):"; tail -n 30 "$log"; } >&2' EXIT

say_and_run() {
    echo "+ $*" >>"$log"
    "$@" >>"$log" 2>&1
}

# The suite gets a source list and list folder of its own, so that the machine's apt configuration stays as it is.
unpack_restic() {
    restic=$cache/restic
    [ -e "$restic/complete" ] && return
    rm -rf "$restic"
    mkdir -p "$restic/apt/lists/partial" "$restic/debs"
    # shellcheck disable=SC2016 # apt's format string
    mirror=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Origin: Debian' 'Codename: bookworm' | head -n 1)
    echo "deb [signed-by=$keyring] $mirror $suite main" >"$restic/apt/sources.list"
    set -- -o "Dir::Etc::sourcelist=$restic/apt/sources.list" -o Dir::Etc::sourceparts=- \
        -o "Dir::State::lists=$restic/apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o APT::Sandbox::User=root
    say_and_run apt-get -q "$@" update
    (cd "$restic/debs" && say_and_run apt-get -q "$@" download restic)
    say_and_run dpkg -x "$restic"/debs/restic_*.deb "$restic/root"
    rm -rf "$restic/apt" "$restic/debs"
    say_and_run "$restic/root/usr/bin/restic" version
    touch "$restic/complete"
}

build_borg() {
    borg=$cache/borg
    [ -e "$borg/complete" ] && return
    rm -rf "$borg"
    say_and_run apt-get -q -o DPkg::Lock::Timeout=120 update
    say_and_run apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends \
        gcc pkg-config python3-venv python3-dev libacl1-dev libssl-dev liblz4-dev libzstd-dev libxxhash-dev e2fsprogs
    say_and_run python3 -m venv "$borg"
    say_and_run "$borg/bin/pip" install -q --disable-pip-version-check "borgbackup==$borg_version"
    say_and_run "$borg/bin/borg" --version
    touch "$borg/complete"
}

install_aws() {
    aws=$cache/aws
    [ -e "$aws/complete" ] && return
    rm -rf "$aws"
    say_and_run python3 -m venv "$aws"
    say_and_run "$aws/bin/pip" install -q --disable-pip-version-check "awscli==$aws_version"
    say_and_run "$aws/bin/aws" --version
    touch "$aws/complete"
}

unpack_restic
build_borg
install_aws
