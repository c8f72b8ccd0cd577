#!/bin/sh
# Builds OpenZFS of Debian's contrib for the kernel of the storage guest, and puts it into the cache folder with its
# programs, to be laid over the guest's packages. Takes ten minutes on two cores, which is why no other test needs it:
# `make test-openzfs` runs this first. Needs what install.sh brings. Run as root. Does nothing when all is there.
#
#   VMSNAP_LAB_CACHE   the cache folder (default /var/cache/vmsnap-lab)
set -eu

cache=${VMSNAP_LAB_CACHE:-/var/cache/vmsnap-lab}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
zfs=$cache/openzfs
log=$cache/openzfs.log
[ -e "$zfs/complete" ] && exit 0
: >"$log"
trap 'status=$?; [ $status -eq 0 ] || { echo "the build of OpenZFS failed ($status):"; tail -n 30 "$log"; } >&2' EXIT

say_and_run() {
    echo "+ $*" >>"$log"
    "$@" >>"$log" 2>&1
}

kernel=$(basename "$(ls -d "$cache"/storage/root/usr/lib/modules/*)")
rm -rf "$zfs"
# contrib gets a source list and list folder of its own, so that the machine's apt configuration stays as it is.
mkdir -p "$zfs/apt/lists/partial" "$zfs/debs"
# shellcheck disable=SC2016 # apt's format string
for uri_and_suite in $(apt-get indextargets --format '$(REPO_URI)|$(RELEASE)' \
    'Created-By: Packages' 'Origin: Debian' 'Component: main' | sort -u); do
    echo "deb [signed-by=$keyring] ${uri_and_suite%%|*} ${uri_and_suite##*|} main contrib"
done >"$zfs/apt/sources.list"
set -- -o "Dir::Etc::sourcelist=$zfs/apt/sources.list" -o Dir::Etc::sourceparts=- \
    -o "Dir::State::lists=$zfs/apt/lists" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
say_and_run apt-get -q -o APT::Sandbox::User=root "$@" update
# Headers alone, which build nothing and start nothing: their makefiles have absolute paths.
say_and_run apt-get -q -y -o DPkg::Lock::Timeout=120 "$@" install --no-install-recommends \
    "linux-headers-$kernel" libelf-dev make gcc libc6-dev
programs=$(apt-get -s -q "$@" install --no-install-recommends zfsutils-linux |
    sed -n 's/^Inst \([^ ]*\) .*/\1/p')
# shellcheck disable=SC2086 # a list of words
(cd "$zfs/debs" && say_and_run apt-get -q -o APT::Sandbox::User=root "$@" download zfs-dkms $programs)
for deb in "$zfs"/debs/*.deb; do
    case $deb in
        */zfs-dkms_*) say_and_run dpkg -x "$deb" "$zfs/source" ;;
        # Of Python the guest has this machine's.
        */python3* | */libpython3*) ;;
        *) say_and_run dpkg -x "$deb" "$zfs/root" ;;
    esac
done
cd "$zfs"/source/usr/src/zfs-*
say_and_run ./configure --with-config=kernel --with-linux="/usr/src/linux-headers-${kernel%-amd64}-common" \
    --with-linux-obj="/usr/src/linux-headers-$kernel"
say_and_run make -s -j"$(nproc)"
mkdir -p "$zfs/root/usr/lib/modules/$kernel/extra"
find module -name '*.ko' -exec cp {} "$zfs/root/usr/lib/modules/$kernel/extra" \;
# As in install.sh: a folder above this machine's links would hide all that is there.
for name in bin sbin lib; do
    [ -d "$zfs/root/$name" ] || continue
    mkdir -p "$zfs/root/usr/$name"
    cp -al "$zfs/root/$name/." "$zfs/root/usr/$name/"
    rm -rf "${zfs:?}/root/$name"
done
rm -rf "$zfs/source" "$zfs/debs" "$zfs/apt"
touch "$zfs/complete"
