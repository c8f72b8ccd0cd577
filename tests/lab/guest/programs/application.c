/*
 * An application that loses data when its machine is cut off, and none when it is shut down in order:
 * it buffers what it counts in RAM, and keeps a transaction of a database open.
 *
 *   application DEVICE
 *
 * Mounts the ext4 file system on DEVICE at /data. Each turn, some 50 a second, adds n to the buffer in
 * RAM and an entry n, with the sum of all amounts beside it, to /data/ledger.db: in one transaction,
 * committed each 2000 entries. Its cache is small, so that most of an open transaction lies in the
 * database already and the journal that undoes it (ledger.db-journal) beside it.
 *
 * On SIGTERM it commits, writes its buffer to /data/buffer (64-bit little-endian numbers), brings all
 * to the disk, unmounts it and ends. Prints:
 *   APPLICATION READY
 *   APPLICATION n ok         several times a second
 *   APPLICATION FLUSHED n
 *   FAULT: text
 */
#include <signal.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LONGEST_TRANSACTION = 2000, MOST_ENTRIES = 1 << 20, SAY_EACH = 10, PAUSE_US = 20000 };

static const char database_path[] = "/data/ledger.db", buffer_path[] = "/data/buffer";
static uint64_t buffer[MOST_ENTRIES];
static sqlite3 *database;
static volatile sig_atomic_t end_asked;

static void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    if (write(STDOUT_FILENO, line, (size_t)length) < 0) /* one write: lines of two programs never mix */
        _exit(3);
}

static void fail(const char *what)
{
    say("FAULT: application: %s: %s", what, database ? sqlite3_errmsg(database) : "");
    exit(3);
}

static void run(const char *sql)
{
    if (sqlite3_exec(database, sql, NULL, NULL, NULL) != SQLITE_OK)
        fail(sql);
}

static void open_database(void)
{
    if (sqlite3_open(database_path, &database) != SQLITE_OK)
        fail("open");
    run("PRAGMA journal_mode=DELETE; PRAGMA synchronous=FULL; PRAGMA cache_size=8;"
        "CREATE TABLE entry(n INTEGER PRIMARY KEY, amount INTEGER, padding BLOB);"
        "CREATE TABLE total(amount INTEGER); INSERT INTO total VALUES(0);");
}

static void add_entry(uint64_t n)
{
    char sql[256];
    unsigned long long amount = n * 7919 % 1000;
    if (n % LONGEST_TRANSACTION == 0)
        run("COMMIT; BEGIN IMMEDIATE");
    snprintf(sql, sizeof sql,
             "INSERT INTO entry VALUES(%llu, %llu, randomblob(1500)); UPDATE total SET amount = amount + %llu",
             (unsigned long long)n, amount, amount);
    run(sql);
}

static void flush_buffer(uint64_t count)
{
    FILE *file = fopen(buffer_path, "w");
    if (!file || fwrite(buffer, sizeof *buffer, count, file) != count || fflush(file) || fsync(fileno(file)))
        fail("buffer");
    fclose(file);
}

static void ask_end(int signal_number)
{
    (void)signal_number;
    end_asked = 1;
}

int main(int argc, char **argv)
{
    signal(SIGTERM, ask_end);
    mkdir("/data", 0755);
    if (argc != 2 || mount(argv[1], "/data", "ext4", 0, NULL))
        fail("mount");
    open_database();
    run("BEGIN IMMEDIATE");
    say("APPLICATION READY");
    uint64_t n = 0;
    while (!end_asked && n < MOST_ENTRIES - 1) {
        n++;
        buffer[n - 1] = n;
        add_entry(n);
        if (n % SAY_EACH == 0)
            say("APPLICATION %llu ok", (unsigned long long)n);
        usleep(PAUSE_US);
    }
    run("COMMIT");
    if (sqlite3_close(database) != SQLITE_OK)
        fail("close");
    flush_buffer(n);
    if (umount("/data"))
        fail("umount");
    say("APPLICATION FLUSHED %llu", (unsigned long long)n);
    return 0;
}
