#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# download.sh FOLDER PACKAGE...: fetch each package into FOLDER/PACKAGE, for a hook of mmdebstrap.
# A meta package of a kernel is followed to the kernel: only the file is wanted, not initramfs-tools and the like.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
folder=$1
shift
for package in "$@"; do
    mkdir "$folder/$package"
    cd "$folder/$package"
    kernel=$(apt-cache depends "$package" | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1)
    # since Debian 14, a kernel is in several packages
    parts=$(apt-cache depends "${kernel:-$package}" | sed -n 's/^ *Depends: \(linux-\(base\|binary\|modules\)-[0-9].*\)$/\1/p')
    apt-get --quiet download "${kernel:-$package}" $parts
done
