/*
 * Sends a numbered packet to everybody on eth0, some 50 a second: 16 bytes of UDP to port 9, the magic
 * "VMSNAPPK" and the number, 64-bit big-endian. Who continues from a copy of its RAM sends the
 * same numbers once more. Prints "PACKETS n sent" several times a second.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PORT = 9, SAY_EACH = 10, PAUSE_US = 20000 };

static int fail(const char *what)
{
    printf("FAULT: packets: %s\n", what);
    return 3;
}

static int bring_up(int fd)
{
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in *address = (struct sockaddr_in *)&request.ifr_addr;
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(0x0a090001); /* 10.9.0.1 */
    if (ioctl(fd, SIOCSIFADDR, &request) || ioctl(fd, SIOCGIFFLAGS, &request))
        return -1;
    request.ifr_flags |= IFF_UP;
    return ioctl(fd, SIOCSIFFLAGS, &request);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 256);
    int fd = socket(AF_INET, SOCK_DGRAM, 0), yes = 1;
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &yes, sizeof yes) ||
        setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "eth0", 5) || bring_up(fd))
        return fail("eth0");
    struct sockaddr_in all = {.sin_family = AF_INET, .sin_port = htons(PORT), .sin_addr.s_addr = INADDR_BROADCAST};
    for (uint64_t n = 1;; n++) {
        uint64_t packet[2], number = htobe64(n);
        memcpy(packet, "VMSNAPPK", 8);
        memcpy(packet + 1, &number, 8);
        /* Not a fault where it cannot be sent: a link may be down. */
        ssize_t sent = sendto(fd, packet, sizeof packet, MSG_DONTWAIT, (struct sockaddr *)&all, sizeof all);
        if (n % SAY_EACH == 0)
            printf("PACKETS %llu %s\n", (unsigned long long)n, sent < 0 ? "refused" : "sent");
        usleep(PAUSE_US);
    }
}
