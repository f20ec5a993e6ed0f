/* SPDX-License-Identifier: Apache-2.0 */
# A boot sector that boots the BIOS's next disk: for emulated disks, which the BIOS numbers before virtio's.
    .code16
    .globl _start
_start:
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $_start, %sp
    cld
    movw $_start, %si            # make room for the next disk's boot sector
    movw $COPY, %di
    movw $256, %cx
    rep movsw
    ljmp $0, $(copied - _start + COPY)
copied:
    incb %dl
    xorb %dh, %dh
    movw $0x0201, %ax
    movw $1, %cx
    movw $_start, %bx
    int $0x13
    ljmp $0, $_start
    .org 510
    .word 0xaa55
