#!/bin/sh
# Installs what the tests need on a Debian 12 machine: QEMU 7.2 with its iSCSI initiator, a C compiler, SQLite, busybox,
# cpio, iproute2, e2fsprogs, xfsprogs, btrfs-progs, sshfs, OVMF, swtpm with the tools by which libvirt sets a TPM up,
# Chromium, systemd and libvirt (neither of which is started; and what libvirt's Python binding is built with) from the
# machine's own suites; the user that libvirt's QEMUs run as; and, in the cache folder, the guest's kernel, an SSH and a
# WebDAV server that no system starts, sudo for the former, Prometheus' promtool, QEMU's guest agent, LVM with the kernel
# that it needs, user-mode Linux, the iSCSI target tgt, zfs-fuse, rtslib for LIO, and QEMU 10.0 from bookworm-backports,
# unpacked beside the installed one.
# Run as root. Does nothing when all is there; says nothing unless it fails.
#
#   VMSNAP_LAB_CACHE   the cache folder (default /var/cache/vmsnap-lab)
set -eu

cache=${VMSNAP_LAB_CACHE:-/var/cache/vmsnap-lab}
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
packages='qemu-system-x86 qemu-utils qemu-block-extra busybox-static cpio gcc libc6-dev libsqlite3-dev e2fsprogs iproute2 xfsprogs
    btrfs-progs openssh-client sshfs ovmf swtpm swtpm-tools libvirt-daemon libvirt-clients libvirt-dev pkg-config python3-dev
    chromium chromium-driver fonts-dejavu-core systemd'
export DEBIAN_FRONTEND=noninteractive LC_ALL=C

mkdir -p "$cache"
log=$cache/install.log
: >"$log"
trap 'status=$?; [ $status -eq 0 ] || { echo "lab install failed ($status):"; tail -n 30 "$log"; } >&2' EXIT

say_and_run() {
    echo "+ $*" >>"$log"
    "$@" >>"$log" 2>&1
}

installed() {
    for package in $packages; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || return 1
    done
}

refreshed=
refresh_lists() {
    [ -n "$refreshed" ] || say_and_run apt-get -q -o DPkg::Lock::Timeout=120 update
    refreshed=yes
}

# fetch_into FOLDER APT-GET-ARGUMENT...: runs apt-get (download …), unpacks what it brought below FOLDER.
fetch_into() {
    folder=$1
    shift
    debs=$(mktemp -d "$cache/debs.XXXXXX")
    # apt's own unprivileged user cannot write here, and these few files need no sandbox.
    (cd "$debs" && say_and_run apt-get -q -o APT::Sandbox::User=root "$@")
    mkdir -p "$folder"
    for deb in "$debs"/*.deb; do
        say_and_run dpkg -x "$deb" "$folder"
    done
    rm -rf "$debs"
}

# packages_for PACKAGE...: these, and those that they need and this machine lacks.
packages_for() {
    apt-get -s -q install --no-install-recommends "$@" | sed -n 's/^Inst \([^ ]*\) .*/\1/p'
}

install_packages() {
    installed && return
    refresh_lists
    # shellcheck disable=SC2086 # a list of words
    say_and_run apt-get -q -y -o DPkg::Lock::Timeout=120 install --no-install-recommends $packages
}

# Unpacked, not installed: installing a kernel package would build an initramfs for this machine.
unpack_kernel() {
    [ -e "$cache/kernel/complete" ] && return
    refresh_lists
    image=$(apt-cache depends --important linux-image-cloud-amd64 |
        sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    rm -rf "$cache/kernel"
    fetch_into "$cache/kernel" download "$image"
    touch "$cache/kernel/complete"
}

# unpack NAME PACKAGE...: these, and the libraries that this machine lacks, below the cache's folder NAME; not installed,
# since that would start servers that the whole network can reach, or log in to what a configuration names.
unpack() {
    place=$cache/$1
    shift
    [ -e "$place/complete" ] && return
    refresh_lists
    rm -rf "$place"
    needed=$(packages_for "$@")
    # shellcheck disable=SC2086 # a list of words
    fetch_into "$place" download "$@" $needed
    touch "$place/complete"
}

# Unpacked, not installed: installing it would start a target that the whole network can reach.
unpack_tgt() {
    tgt=$cache/tgt
    [ -e "$tgt/complete" ] && return
    refresh_lists
    rm -rf "$tgt"
    needed=$(packages_for tgt)
    # shellcheck disable=SC2086 # a list of words
    fetch_into "$tgt/root" download $needed
    mkdir "$tgt/bin"
    for name in tgtd tgtadm; do
        cat >"$tgt/bin/$name" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH=$tgt/root/usr/lib/x86_64-linux-gnu
exec $tgt/root/usr/sbin/$name "\$@"
WRAPPER
        chmod 755 "$tgt/bin/$name"
    done
    touch "$tgt/complete"
}

# Unpacked, not installed: installing it would start a daemon.
unpack_zfs_fuse() {
    zfs=$cache/zfs-fuse
    [ -e "$zfs/complete" ] && return
    refresh_lists
    rm -rf "$zfs"
    needed=$(packages_for zfs-fuse)
    # shellcheck disable=SC2086 # a list of words
    fetch_into "$zfs/root" download $needed
    mkdir "$zfs/bin"
    for name in zfs zpool zfs-fuse; do
        cat >"$zfs/bin/$name" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH=$zfs/root/usr/lib/x86_64-linux-gnu:$zfs/root/lib/x86_64-linux-gnu
exec $(find "$zfs/root" -path "*sbin/$name" -type f) "\$@"
WRAPPER
        chmod 755 "$zfs/bin/$name"
    done
    touch "$zfs/complete"
}

# Unpacked, not installed, for the same reason: by rtslib the tests make targets of LIO as its users do.
unpack_lio() {
    lio=$cache/lio
    [ -e "$lio/complete" ] && return
    refresh_lists
    rm -rf "$lio"
    needed=$(packages_for python3-rtslib-fb)
    # shellcheck disable=SC2086 # a list of words
    fetch_into "$lio/root" download $needed
    touch "$lio/complete"
}

# Unpacked, not installed, so that this machine's users get no more rights: what an SSH server of the lab has above its
# root file system. sudo is set-user-ID: nobody but root gets at it here.
unpack_sudo() {
    sudo=$cache/sudo
    [ -e "$sudo/complete" ] && return
    refresh_lists
    rm -rf "$sudo"
    mkdir -m 700 "$sudo"
    fetch_into "$sudo/root" download sudo
    touch "$sudo/complete"
}

# Unpacked, not installed: of Prometheus the tool alone that checks rules and metrics.
unpack_promtool() {
    promtool=$cache/promtool
    [ -e "$promtool/complete" ] && return
    refresh_lists
    rm -rf "$promtool"
    fetch_into "$promtool/whole" download prometheus
    mv "$promtool/whole/usr/bin/promtool" "$promtool/promtool"
    rm -rf "$promtool/whole"
    touch "$promtool/complete"
}

# Unpacked, not installed: it is for guests.
unpack_agent() {
    agent=$cache/agent
    [ -e "$agent/complete" ] && return
    refresh_lists
    rm -rf "$agent"
    needed=$(packages_for qemu-guest-agent)
    # shellcheck disable=SC2086 # a list of words
    fetch_into "$agent" download $needed
    touch "$agent/complete"
}

# Unpacked, not installed: what a guest's root file system has above this machine's, the kernel with device mapper and
# 9p, LVM, and what each needs that this machine lacks.
unpack_storage() {
    storage=$cache/storage
    [ -e "$storage/complete" ] && return
    refresh_lists
    rm -rf "$storage"
    image=$(apt-cache depends --important linux-image-amd64 |
        sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1)
    needed=$(packages_for kmod lvm2 thin-provisioning-tools)
    # shellcheck disable=SC2086 # a list of words
    fetch_into "$storage/root" download "$image" $needed
    # This machine's /sbin is a link to /usr/sbin, as Debian has it since 12: a folder above it would hide all that is there.
    for name in bin sbin lib; do
        mkdir -p "$storage/root/usr/$name"
        cp -al "$storage/root/$name/." "$storage/root/usr/$name/"
        rm -rf "${storage:?}/root/$name"
        ln -s "usr/$name" "$storage/root/$name"
    done
    # The package's link is absolute, and right in the guest alone.
    ln -sf "$storage/root/bin/kmod" "$storage/depmod"
    depmod=$(command -v depmod || echo "$storage/depmod")
    say_and_run "$depmod" -b "$storage/root" "${image#linux-image-}"
    touch "$storage/complete"
}

# The backports suite gets a source list and list folder of its own, so that the machine's apt
# configuration stays as it is. What a (simulated) installation would bring is what is unpacked:
# QEMU and those shared libraries that this machine lacks.
unpack_backported_qemu() {
    qemu=$cache/qemu-10.0
    [ -e "$qemu/complete" ] && return
    refresh_lists
    rm -rf "$qemu"
    mkdir -p "$qemu/apt/lists/partial"
    # shellcheck disable=SC2016 # apt's format string
    mirror=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Origin: Debian' 'Codename: bookworm' | head -n 1)
    for suite in bookworm bookworm-backports; do
        echo "deb [signed-by=$keyring] $mirror $suite main"
    done >"$qemu/apt/sources.list"
    set -- -o "Dir::Etc::sourcelist=$qemu/apt/sources.list" -o Dir::Etc::sourceparts=- \
        -o "Dir::State::lists=$qemu/apt/lists" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
    say_and_run apt-get -q -o APT::Sandbox::User=root "$@" update
    wanted='qemu-system-x86 qemu-system-common qemu-system-data qemu-utils seabios'
    # shellcheck disable=SC2086 # lists of words
    needed=$(apt-get -s -q "$@" -t bookworm-backports install --no-install-recommends $wanted |
        sed -n 's/^Inst \([^ ]*\) .*/\1/p')
    # shellcheck disable=SC2086
    fetch_into "$qemu/root" "$@" -t bookworm-backports download $wanted $needed
    rm -rf "$qemu/apt"
    write_wrapper qemu-system-x86_64
    write_wrapper qemu-img
    write_wrapper qemu-io
    write_wrapper qemu-nbd
    say_and_run "$qemu/qemu-system-x86_64-10.0" -version
    touch "$qemu/complete"
}

# The wrapper execs the real binary with everything it needs in its arguments and environment, so
# that /proc/PID/cmdline and /proc/PID/environ of a running one are enough to start another.
write_wrapper() {
    usr=$qemu/root/usr
    case $1 in
        qemu-system-*) firmware="-L $usr/share/qemu -L $usr/share/seabios" ;;
        *) firmware= ;;
    esac
    cat >"$qemu/$1-10.0" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH=$usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR=$usr/lib/x86_64-linux-gnu/qemu
exec $usr/bin/$1 $firmware "\$@"
WRAPPER
    chmod 755 "$qemu/$1-10.0"
}

# Debian makes this user in libvirt-daemon-system, which would also start libvirt.
add_user() {
    getent passwd libvirt-qemu >/dev/null && return
    say_and_run useradd --system --user-group --home-dir /var/lib/libvirt --shell /usr/sbin/nologin libvirt-qemu
}

install_packages
add_user
unpack_kernel
unpack sshd openssh-server
unpack_sudo
# The WebDAV server of an example in docs/examples.
unpack lighttpd lighttpd lighttpd-mod-webdav
unpack_promtool
unpack_agent
unpack_storage
unpack user-mode-linux user-mode-linux
unpack_tgt
unpack_zfs_fuse
unpack_lio
# For the guest whose kernel has the initiator.
unpack open-iscsi open-iscsi
unpack_backported_qemu
