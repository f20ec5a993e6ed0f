#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# package.sh JOBS NOTE: in a root tree of the release, beside this folder's other files and one source package of Xen,
# unpack it, change it, build the hypervisor, and make the package in out/. NOTE goes into the package's description.
set -eu
jobs=$1
note=$2
here=$PWD

dpkg-source -x ./*.dsc source
cd source
original=$(dpkg-parsechangelog -S Version)
date=$(dpkg-parsechangelog -S Date)
version="$original+nvdimm1"
series=$(echo "$original" | grep -oE '^[0-9]+\.[0-9]+')
name=xen-hypervisor-$series-nvdimm
python3 "$here/apply.py" . >"$here/change.diff"

# The hypervisor's log has the version of the package, from the changelog. The date makes the build repeatable.
cat - debian/changelog >"$here/changelog" <<EOF
xen ($version) UNRELEASED; urgency=medium

  * Built from the source package xen $original by contrib/xen-write-back of nvdimm_driver:
    persistent memory that the toolstack maps into a guest and pins as write-back is cached.

 -- nvdimm_driver <root@localhost>  $date

EOF
cp "$here/changelog" debian/changelog
export SOURCE_DATE_EPOCH="$(date -d "$date" +%s)"
make -f "$here/build.mk" -j "$jobs" nvdimm-hypervisor >"$here/build.log" 2>&1 || {
    tail -n 60 "$here/build.log" >&2
    exit 1
}

tree=$here/tree
doc=$tree/usr/share/doc/$name
mkdir -p "$tree/DEBIAN" "$tree/boot" "$doc"
gzip -n -9 -c xen/xen >"$tree/boot/xen-$series-nvdimm.gz"
cp xen/.config "$tree/boot/xen-$series-nvdimm.config"
cp "$here/README.md" "$here/direct-mmio-wb.h" "$here/write-back.cocci" "$doc"
gzip -n -9 -c "$here/change.diff" >"$doc/change.diff.gz"
gzip -n -9 -c debian/changelog >"$doc/changelog.Debian.gz"
cp debian/copyright "$doc/copyright"
for script in postinst postrm triggers; do
    sed "s/@series@/$series/g; s/@source@/$original/g" "$here/$script.in" >"$tree/DEBIAN/$script"
done
chmod 755 "$tree/DEBIAN/postinst" "$tree/DEBIAN/postrm"
cat >"$tree/DEBIAN/control" <<EOF
Package: $name
Version: $version
Source: xen ($original)
Architecture: amd64
Maintainer: nvdimm_driver <root@localhost>
Section: kernel
Priority: optional
Depends: xen-hypervisor-$series-amd64
Recommends: xen-hypervisor-common
Installed-Size: $(du -sk "$tree" | cut -f1)
Description: Xen hypervisor whose guests reach persistent memory by the cache
 The hypervisor of Debian's source package xen $original with one
 change: direct MMIO that the toolstack has pinned as write-back, and that the
 host's MTRRs have as write-back, is mapped so. It lies beside Debian's own
 hypervisor, which boots again when this package is removed.
 .
 $note
EOF
find "$tree" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
mkdir -p "$here/out"
dpkg-deb --root-owner-group -b "$tree" "$here/out/${name}_$(echo "$version" | sed 's/^[0-9]*://')_amd64.deb"
cp "$here/build.log" "$here/change.diff" "$here/out"
