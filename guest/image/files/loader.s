/*
 * Puts an LZ4-compressed Linux kernel in its place and starts it.
 *
 * Debian's standard kernel is compressed by xz, which takes an emulated processor 3.2 of the 3.7 s until its first line
 * (QEMU without hardware virtualization), and minutes where VirtualBox interprets. So the image carries the same kernel,
 * byte for byte, packed with LZ4, behind this loader instead of the one that Linux brings along. It does what
 * arch/x86/boot/compressed does and no more: no relocation (the kernel runs where it was linked for), no EFI, no SEV.
 *
 * On entry (Documentation/x86/boot.rst, "32-bit boot protocol"): 32-bit protected mode, flat segments, no paging,
 * interrupts off, %esi = boot_params. LOAD_ADDRESS is 1 MiB, where every boot loader puts a kernel that is not
 * relocatable. On exit ("64-bit boot protocol"): long mode, identity-mapped pages, %rsi = boot_params.
 *
 * Linked for LOAD_ADDRESS. Given by the build (--defsym): PAYLOAD_BYTES (multiple of 8), PAYLOAD_SPARE_ADDRESS (memory above the
 * kernel's own, where the packed kernel waits), KERNEL_ADDRESS, KERNEL_ENTRY. The payload follows the loader: blocks as in
 * lz4's "legacy" format, each a 32-bit length and an LZ4 block, ended by a length of 0.
 */

        .text
        .code32
        .globl  loader
loader:
        cli
        cld
        movl    %esi, %ebp              /* boot_params, kept to the end */

        /* Identity map of the first 4 GiB in pages of 2 MiB: one level 4 and one level 3 table, four of level 2. */
        movl    $level2, %edi
        movl    $0x83, %eax             /* present, writable, large */
        movl    $2048, %ecx
1:      movl    %eax, (%edi)
        movl    $0, 4(%edi)
        addl    $0x200000, %eax
        addl    $8, %edi
        loop    1b
        movl    $level3, %edi
        movl    $level2 + 3, %eax
        movl    $4, %ecx
2:      movl    %eax, (%edi)
        addl    $0x1000, %eax
        addl    $8, %edi
        loop    2b
        movl    $level3 + 3, level4

        lgdt    gdt_pointer
        movl    %cr4, %eax
        orl     $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $level4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER */
        rdmsr
        orl     $0x100, %eax            /* long mode */
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax       /* paging, protected mode */
        movl    %eax, %cr0
        ljmp    $0x10, $long_mode

        .code64
long_mode:
        movl    $0x18, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss

        /* Unpacking must not overwrite what is still packed: move that above the kernel. */
        movl    $payload, %esi
        movl    $PAYLOAD_SPARE_ADDRESS, %edi
        movl    $(PAYLOAD_BYTES / 8), %ecx
        rep movsq

        movl    $PAYLOAD_SPARE_ADDRESS, %esi
        movl    $KERNEL_ADDRESS, %edi

        /* LZ4 (lz4_Block_format.md). Copies go by 8 bytes and may write up to 7 too many: the next copy corrects them. */
next_block:
        movl    (%rsi), %ecx
        addq    $4, %rsi
        testl   %ecx, %ecx
        jz      finished
        leaq    (%rsi,%rcx), %r8        /* end of this block */

next_sequence:
        movzbl  (%rsi), %eax            /* token: literals << 4 | match - 4 */
        incq    %rsi
        movl    %eax, %ecx
        andl    $15, %eax
        shrl    $4, %ecx
        jz      literals_done
        cmpl    $15, %ecx
        jne     copy_literals
3:      movzbl  (%rsi), %edx
        incq    %rsi
        addl    %edx, %ecx
        cmpl    $255, %edx
        je      3b
copy_literals:
        leaq    (%rsi,%rcx), %r9
        leaq    (%rdi,%rcx), %r10
4:      movq    (%rsi), %rdx
        addq    $8, %rsi
        movq    %rdx, (%rdi)
        addq    $8, %rdi
        cmpq    %r10, %rdi
        jb      4b
        movq    %r9, %rsi
        movq    %r10, %rdi
literals_done:
        cmpq    %r8, %rsi               /* the last sequence of a block has no match */
        jae     next_block

        movzwl  (%rsi), %ebx            /* how far back */
        addq    $2, %rsi
        cmpl    $15, %eax
        jne     copy_match
5:      movzbl  (%rsi), %edx
        incq    %rsi
        addl    %edx, %eax
        cmpl    $255, %edx
        je      5b
copy_match:
        addl    $4, %eax
        movq    %rdi, %r11
        subq    %rbx, %r11
        cmpl    $8, %ebx
        jb      copy_near
        leaq    (%rdi,%rax), %r10
6:      movq    (%r11), %rdx
        addq    $8, %r11
        movq    %rdx, (%rdi)
        addq    $8, %rdi
        cmpq    %r10, %rdi
        jb      6b
        movq    %r10, %rdi
        jmp     next_sequence

copy_near:                              /* source and target overlap within a word: byte by byte */
        movl    %eax, %ecx
        cmpl    $1, %ebx
        je      fill
        xchgq   %rsi, %r11
        rep movsb
        movq    %r11, %rsi
        jmp     next_sequence
fill:                                   /* the runs of zeros */
        movb    (%r11), %al
        rep stosb
        jmp     next_sequence

finished:
        movl    %ebp, %esi
        movl    $KERNEL_ENTRY, %eax
        jmp     *%rax

        .balign 8
gdt:    .quad   0
        .quad   0
        .quad   0x00af9a000000ffff      /* 0x10: code, 64 bits */
        .quad   0x00cf92000000ffff      /* 0x18: data */
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

        .balign 4096
level4: .fill   4096, 1, 0
level3: .fill   4096, 1, 0
level2: .fill   4 * 4096, 1, 0
payload:
