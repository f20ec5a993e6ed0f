/* SPDX-License-Identifier: Apache-2.0 */
# The boot sector of the guest's disk: copies extents of the disk to where Linux wants them, then starts Linux.
# image.py writes the extents into it, has filled in Linux's header (Documentation/arch/x86/boot.rst of Linux), and gives
# LINUX, the segment of Linux's setup, STACK, where in that the stack begins, and EXTENTS, where in this sector they are.
    .set BUFFER, 0x1000          # segment; 127 sectors are the most that the BIOS reads at once
    .set SECTORS_MAX, 127

    .code16
    .globl _start
_start:
    ljmp $0, $1f
1:  xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $_start, %sp
    cld
    movb %dl, drive
    movw $extents, %bp

extent:                          # at %bp: first sector, number of sectors, address
    movl 4(%bp), %eax
    testl %eax, %eax
    jz start_linux
    cmpl $SECTORS_MAX, %eax
    jbe 2f
    movl $SECTORS_MAX, %eax
2:  movw %ax, count
    movl (%bp), %ebx
    movl %ebx, sector
    movl 8(%bp), %edi
    subl %eax, 4(%bp)
    addl %eax, (%bp)
    shll $9, %eax
    addl %eax, 8(%bp)

    movb drive, %dl
    movw $packet, %si
    movb $0x42, %ah
    int $0x13
    jc failed

    cli                          # a limit of 4 GiB, given to %es in protected mode, lasts until it is loaded again
    lgdt table
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    movw $8, %bx
    movw %bx, %es
    andb $0xfe, %al
    movl %eax, %cr0
    movzwl count, %ecx
    shll $7, %ecx
    movw $BUFFER, %ax
    movw %ax, %ds
    xorl %esi, %esi
    addr32 rep movsl
    sti
    movw %cx, %ds
    movl 4(%bp), %eax
    testl %eax, %eax
    jnz extent
    addw $12, %bp
    jmp extent

start_linux:
    movw $LINUX, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    cli
    movw %ax, %ss
    movw $STACK, %sp
    sti
    ljmp $LINUX + 0x20, $0

failed:
    hlt
    jmp failed

drive:
    .byte 0
    .balign 4
packet:                          # of int 13h, function 42h
    .word 16
count:
    .word 0, 0, BUFFER
sector:
    .long 0, 0
table:                           # the limit and address of two descriptors: none, and all memory as data
    .word 15
    .long descriptors
    .balign 8
descriptors:
    .quad 0, 0x00cf92000000ffff

    .org EXTENTS
extents:
    .org 510
    .word 0xaa55
