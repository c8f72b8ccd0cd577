/* The guest of the tests: counts in RAM, and keeps its count on two disks.
 *
 * A Multiboot kernel (version 0.6.96) for QEMU's pc machine. At 2 MiB of its RAM lie its words: a magic number, its
 * count, what it found wrong, whether it is deaf to the power button. The first sector of each disk holds the count, the
 * 64 after it the last counts in a ring. Each turn reads both: the count has to be the one in RAM, and the place in the
 * ring that is written next must hold the count of a whole round ago, and nothing that this guest has not written yet.
 * Then it writes the next one. On the power button it writes the count once more, marked as clean, and turns the machine
 * off.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define MAGIC 0x564d5348u
#define TURNS_A_SECOND 100
#define RING 64

struct words { u32 magic, count, fault, deaf; };
#define WORDS ((volatile struct words *)0x200000)

__attribute__((section(".multiboot"), used)) static const u32 header[] = {0x1badb002, 0, -0x1badb002};

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u16 inw(u16 port) { u16 value; __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static inline u32 inl(u16 port) { u32 value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }

/* ATA by programmed I/O (ATA/ATAPI-6, 9.5 and 9.6), primary channel, 28-bit addresses. */
static void wait_until_ready(u8 wanted)
{
    while ((inb(0x1f7) & 0x80) || (wanted && !(inb(0x1f7) & wanted)))
        ;
}

static void command(int disk, u8 what, u32 at)
{
    wait_until_ready(0);
    outb(0x1f6, 0xe0 | disk << 4);
    outb(0x1f2, 1);
    outb(0x1f3, at);
    outb(0x1f4, 0);
    outb(0x1f5, 0);
    outb(0x1f7, what);
    wait_until_ready(0x08);
}

static void read_sector(int disk, u32 at, u16 *words)
{
    command(disk, 0x20, at);
    for (int i = 0; i < 256; i++)
        words[i] = inw(0x1f0);
}

static void write_sector(int disk, u32 at, const u16 *words)
{
    command(disk, 0x30, at);
    for (int i = 0; i < 256; i++)
        outw(0x1f0, words[i]);
    wait_until_ready(0);
}

static u32 sector[128];

static void keep(u32 count, u32 clean)
{
    sector[0] = MAGIC, sector[1] = count, sector[2] = clean;
    for (int disk = 0; disk < 2; disk++) {
        write_sector(disk, 1 + count % RING, (const u16 *)sector);
        write_sector(disk, 0, (const u16 *)sector);
    }
}

/* The power management ports of the PIIX4 lie where its register 0x40 says (device 1, function 3 of QEMU's pc). */
static u16 power_ports(void)
{
    for (u32 device = 0; device < 32; device++) {
        outl(0xcf8, 0x80000300 | device << 11);
        if (inl(0xcfc) == 0x71138086) {
            outl(0xcf8, 0x80000340 | device << 11);
            return inl(0xcfc) & 0xffc0;
        }
    }
    return 0x600;
}

/* The timer wakes the processor; nothing else interrupts it. */
struct gate { u16 low, selector; u8 zero, type; u16 high; } __attribute__((packed));
struct table { u16 limit; u32 base; } __attribute__((packed));
static struct gate gates[33];
static const unsigned long long segments[] = {0, 0x00cf9a000000ffffull, 0x00cf92000000ffffull};
static u8 stack[16384] __attribute__((aligned(16)));

__attribute__((naked)) static void tick(void)
{
    __asm__ volatile("push %eax; mov $0x20, %al; outb %al, $0x20; pop %eax; iret");
}

static void set_up_timer(void)
{
    struct table segment_table = {sizeof segments - 1, (u32)segments};
    struct table gate_table = {sizeof gates - 1, (u32)gates};
    __asm__ volatile("lgdt %0; ljmp $8, $1f; 1: mov $16, %%eax; mov %%eax, %%ds; mov %%eax, %%es; mov %%eax, %%ss"
                     : : "m"(segment_table) : "eax");
    gates[32] = (struct gate){(u32)tick & 0xffff, 8, 0, 0x8e, (u32)tick >> 16};
    __asm__ volatile("lidt %0" : : "m"(gate_table));
    outb(0x20, 0x11), outb(0x21, 0x20), outb(0x21, 4), outb(0x21, 1), outb(0x21, 0xfe);
    outb(0xa0, 0x11), outb(0xa1, 0x28), outb(0xa1, 2), outb(0xa1, 1), outb(0xa1, 0xff);
    u16 divisor = 1193182 / TURNS_A_SECOND;
    outb(0x43, 0x34), outb(0x40, divisor & 0xff), outb(0x40, divisor >> 8);
    __asm__ volatile("sti");
}

__attribute__((used)) static void work(void)
{
    volatile struct words *words = WORDS;
    set_up_timer();
    outb(0x3f6, 2); /* the disks do not interrupt */
    u16 power = power_ports();
    outw(power + 2, 0x100); /* PWRBTN_EN, without which the button is not shown (ACPI 4.8.3.1.2) */
    words->count = words->fault = words->deaf = 0;
    keep(0, 0);
    words->magic = MAGIC;
    for (;;) {
        __asm__ volatile("hlt");
        for (int disk = 0; disk < 2; disk++) {
            u32 next = words->count + 1;
            read_sector(disk, 0, (u16 *)sector);
            if (sector[0] != MAGIC || sector[1] != words->count)
                words->fault = disk + 1;
            read_sector(disk, 1 + next % RING, (u16 *)sector);
            if (sector[1] != (next < RING ? 0 : next - RING))
                words->fault = disk + 1;
        }
        if (words->fault)
            continue;
        if (inw(power) & 0x100 && !words->deaf) { /* PWRBTN_STS (ACPI 4.8.3.1.1) */
            keep(words->count, 1);
            outw(power + 4, 0x2000); /* SLP_EN, soft off */
        }
        keep(words->count + 1, 0);
        words->count++;
    }
}

__attribute__((naked, section(".text.start"), used)) void start(void)
{
    __asm__ volatile("cli; mov %0, %%esp; call work" : : "i"(stack + sizeof stack));
}
