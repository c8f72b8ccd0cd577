# The smallest guest: what a PC's firmware loads from the first sector of its disk. It counts in RAM, and writes each
# count to sector 8. Before that it reads the sector: what stands there must be the count that it has in RAM, so that
# RAM and disk that are not of one instant are told at once. On the serial port it says for each count `.`, for a
# count that differs `X`, for an error of the disk `E`. At the power button it writes "OFF!" behind its count, says `O`,
# and switches itself off.
#
# Disk by SeaBIOS' extended INT 13h; PM1a of the PIIX4 at 0x600 (SeaBIOS src/fw/dev-piix.h, ACPI 4.8.3).

.code16
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
    movb %dl, drive
    movw $0x602, %dx            # PM1 enable: the power button
    movw $0x100, %ax
    outw %ax, %dx

count:
    movb $0x42, %ah
    movw $reading, %si
    call disk
    movl 0x8000, %eax
    cmpl %eax, 0x8200
    movb $'X', %al
    jne say
    incl 0x8000
    movb $0x43, %ah
    movw $writing, %si
    call disk
    movb $'.', %al
say:
    call put
    hlt                         # until the next tick of the timer, 18 times a second
    movw $0x600, %dx            # PM1 status: has the button been pressed?
    inw %dx, %ax
    testb $1, %ah
    jz count

    movl $0x2146464f, 0x8004
    movb $0x43, %ah
    movw $writing, %si
    call disk
    movb $'O', %al
    call put
    movw $0x604, %dx            # PM1 control: sleep, S5
    movw $0x2000, %ax
    outw %ax, %dx
stop:
    hlt
    jmp stop

disk:
    movb drive, %dl
    movb $0, %al
    int $0x13
    jnc back
    movb $'E', %al
put:
    movw $0x3f8, %dx
    outb %al, %dx
back:
    ret

drive:
    .byte 0
reading:                        # one sector to 0x8200
    .byte 16, 0
    .word 1, 0x8200, 0
    .quad 8
writing:                        # one sector from 0x8000
    .byte 16, 0
    .word 1, 0x8000, 0
    .quad 8

.org 510
    .word 0xaa55
