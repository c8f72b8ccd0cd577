/*
 * Preloaded into a process, stands between it and the files below a folder.
 *
 * Records everything that it does to them, in the order in which it happened, so that it can be worked out what a
 * power cut at any moment could have left: see recording.py, which reads the records. Or lets one call fail, in a
 * process that has called `arm`: see failing.py.
 *
 *   LD_PRELOAD=between.so RECORDED_FOLDER=/absolute/path [RECORD_LOG=/another/path] program …
 *
 * What is mapped and written to in memory is not seen.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, TRUNCATE, SYNC_BEGINS, SYNC_ENDS, CREATE, LINK, UNLINK, RENAME, MKDIR, RMDIR, ZERO };

struct record {
    uint32_t kind;
    uint32_t first_length; /* of the path */
    uint64_t second_length; /* of the data, or of the other path */
    uint64_t inode;
    uint64_t number; /* offset, length or token */
};

static const char *folder;
static size_t folder_length;
static int log_fd = -1;

/* What every call can fail with. */
static const int ERRORS[] = {ENOSPC, EIO, EDQUOT, ENOMEM, EMFILE};

enum action { OPENING, READING, WRITING, SYNCING, NAMING, REMOVING };

static _Atomic long calls_left = LONG_MAX;
static int which, lasts;

/*
 * Lets the call number `number` from now on fail, with the error number `choice` of ERRORS; where it
 * `lasts`, so do all later ones that write or name something, as on a disk that is full.
 */
void arm(long number, int choice, int lasting)
{
    which = choice;
    lasts = lasting;
    calls_left = number;
}

/* How many calls are left until one fails. */
long left(void)
{
    return calls_left;
}

static int fails(enum action action, int is_ours)
{
    if (!is_ours || calls_left == LONG_MAX)
        return 0;
    long now = --calls_left;
    if (now > 0 || (now < 0 && !(lasts && (action == WRITING || action == NAMING))))
        return 0;
    errno = ERRORS[which];
    return 1;
}

__attribute__((constructor)) static void begin(void)
{
    folder = getenv("RECORDED_FOLDER");
    folder_length = folder ? strlen(folder) : 0;
    const char *path = getenv("RECORD_LOG");
    if (!folder || !path)
        return;
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    /* Out of the way of programs that count on low numbers. */
    int high = fcntl(log_fd, F_DUPFD_CLOEXEC, 700);
    syscall(SYS_close, log_fd);
    log_fd = high;
}

static void note(uint32_t kind, const char *path, const void *data, size_t length, uint64_t inode, uint64_t number)
{
    if (log_fd < 0)
        return;
    struct record record = {kind, path ? (uint32_t)strlen(path) : 0, length, inode, number};
    struct iovec parts[] = {
        {&record, sizeof record}, {(void *)path, record.first_length}, {(void *)data, length}};
    int saved = errno;
    ssize_t wanted = (ssize_t)(sizeof record + record.first_length + length);
    if (syscall(SYS_writev, log_fd, parts, 3) != wanted)
        abort(); /* a record that is not whole would be worse than none */
    errno = saved;
}

/* Whether a path is the folder itself or leads below it. */
static int is_below(const char *path)
{
    return !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

/* The absolute path of a name below a folder's descriptor, NULL where it is none of ours. */
static const char *ours(int at, const char *name, char *path)
{
    if (!folder || !name)
        return NULL;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char link[64];
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, path, PATH_MAX - 1);
        if (length < 0)
            return NULL;
        snprintf(path + length, (size_t)(PATH_MAX - length), "/%s", name);
    }
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/')
        path[--length] = 0;
    return is_below(path) ? path : NULL;
}

/* The inode behind a descriptor of a file of ours (its path in `path`), 0 for any other. */
static uint64_t inode_of(int fd, char *path, int wanted_type)
{
    struct stat found;
    char link[64];
    if (!folder || fstat(fd, &found) || (wanted_type && (int)(found.st_mode & S_IFMT) != wanted_type))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_below(path) ? found.st_ino : 0;
}

static int is_ours(int fd)
{
    char path[PATH_MAX];
    return calls_left != LONG_MAX && inode_of(fd, path, 0);
}

static int is_named_ours(int at, const char *name)
{
    char path[PATH_MAX];
    return calls_left != LONG_MAX && ours(at, name, path);
}

static void wrote(int fd, const void *data, ssize_t length, off_t offset)
{
    char path[PATH_MAX];
    uint64_t inode = length > 0 ? inode_of(fd, path, S_IFREG) : 0;
    if (inode)
        note(WRITE, NULL, data, (size_t)length, inode, (uint64_t)offset);
}

static void wrote_pieces(int fd, const struct iovec *pieces, int count, ssize_t length, off_t offset)
{
    for (int i = 0; i < count && length > 0; i++) {
        ssize_t part = length < (ssize_t)pieces[i].iov_len ? length : (ssize_t)pieces[i].iov_len;
        wrote(fd, pieces[i].iov_base, part, offset);
        offset += part;
        length -= part;
    }
}

static off_t position(int fd)
{
    return (off_t)syscall(SYS_lseek, fd, 0, SEEK_CUR);
}

/* What the kernel itself has copied is read back. */
static void copied(int fd, ssize_t length, off_t offset)
{
    char path[PATH_MAX];
    if (length <= 0 || !inode_of(fd, path, S_IFREG))
        return;
    int again = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
    char *data = malloc((size_t)length);
    if (again < 0 || !data || syscall(SYS_pread64, again, data, length, offset) != length)
        abort();
    wrote(fd, data, length, offset);
    free(data);
    syscall(SYS_close, again);
}

/* -- opening */

static int opened(int at, const char *name, int flags, mode_t mode)
{
    if (fails(OPENING, is_named_ours(at, name)))
        return -1;
    char path[PATH_MAX];
    const char *mine = flags & (O_CREAT | O_TRUNC) ? ours(at, name, path) : NULL;
    int is_new = mine && (flags & O_CREAT) && faccessat(at, name, F_OK, AT_SYMLINK_NOFOLLOW);
    int fd = (int)syscall(SYS_openat, at, name, flags, mode);
    if (fd >= 0 && mine) {
        struct stat found;
        fstat(fd, &found);
        if (is_new)
            note(CREATE, mine, NULL, 0, found.st_ino, 0);
        else if (flags & O_TRUNC)
            note(TRUNCATE, NULL, NULL, 0, found.st_ino, 0);
    }
    return fd;
}

#define MODE_ARGUMENT                                                                                                  \
    mode_t mode = 0;                                                                                                   \
    if (flags & O_CREAT) {                                                                                             \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

int open(const char *name, int flags, ...)
{
    MODE_ARGUMENT
    return opened(AT_FDCWD, name, flags, mode);
}

int open64(const char *name, int flags, ...)
{
    MODE_ARGUMENT
    return opened(AT_FDCWD, name, flags, mode);
}

int openat(int at, const char *name, int flags, ...)
{
    MODE_ARGUMENT
    return opened(at, name, flags, mode);
}

int openat64(int at, const char *name, int flags, ...)
{
    MODE_ARGUMENT
    return opened(at, name, flags, mode);
}

/* -- data */

ssize_t write(int fd, const void *data, size_t size)
{
    if (fails(WRITING, is_ours(fd)))
        return -1;
    ssize_t done = (ssize_t)syscall(SYS_write, fd, data, size);
    char path[PATH_MAX];
    if (done > 0 && inode_of(fd, path, S_IFREG))
        wrote(fd, data, done, position(fd) - done);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset)
{
    if (fails(WRITING, is_ours(fd)))
        return -1;
    ssize_t done = (ssize_t)syscall(SYS_pwrite64, fd, data, size, offset);
    wrote(fd, data, done, offset);
    return done;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    return pwrite64(fd, data, size, offset);
}

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
    if (fails(WRITING, is_ours(fd)))
        return -1;
    ssize_t done = (ssize_t)syscall(SYS_writev, fd, pieces, count);
    char path[PATH_MAX];
    if (done > 0 && inode_of(fd, path, S_IFREG))
        wrote_pieces(fd, pieces, count, done, position(fd) - done);
    return done;
}

ssize_t pwritev64v2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    if (fails(WRITING, is_ours(fd)))
        return -1;
    ssize_t done = (ssize_t)syscall(SYS_pwritev2, fd, pieces, count, offset, 0L, flags);
    wrote_pieces(fd, pieces, count, done, offset);
    return done;
}

ssize_t pwritev2(int fd, const struct iovec *pieces, int count, off_t offset, int flags)
{
    return pwritev64v2(fd, pieces, count, offset, flags);
}

ssize_t pwritev64(int fd, const struct iovec *pieces, int count, off_t offset)
{
    return pwritev64v2(fd, pieces, count, offset, 0);
}

ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t offset)
{
    return pwritev64v2(fd, pieces, count, offset, 0);
}

ssize_t sendfile64(int out, int in, off_t *offset, size_t size)
{
    if (fails(WRITING, is_ours(out)))
        return -1;
    ssize_t done = (ssize_t)syscall(SYS_sendfile, out, in, offset, size);
    copied(out, done, position(out) - done);
    return done;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size)
{
    return sendfile64(out, in, offset, size);
}

ssize_t copy_file_range(int in, off_t *in_offset, int out, off_t *out_offset, size_t size, unsigned flags)
{
    if (fails(WRITING, is_ours(out)))
        return -1;
    ssize_t done = (ssize_t)syscall(SYS_copy_file_range, in, in_offset, out, out_offset, size, flags);
    copied(out, done, (out_offset ? *out_offset : position(out)) - done);
    return done;
}

ssize_t read(int fd, void *data, size_t size)
{
    if (fails(READING, is_ours(fd)))
        return -1;
    return (ssize_t)syscall(SYS_read, fd, data, size);
}

ssize_t pread64(int fd, void *data, size_t size, off_t offset)
{
    if (fails(READING, is_ours(fd)))
        return -1;
    return (ssize_t)syscall(SYS_pread64, fd, data, size, offset);
}

ssize_t pread(int fd, void *data, size_t size, off_t offset)
{
    return pread64(fd, data, size, offset);
}

ssize_t preadv64(int fd, const struct iovec *pieces, int count, off_t offset)
{
    if (fails(READING, is_ours(fd)))
        return -1;
    return (ssize_t)syscall(SYS_preadv, fd, pieces, count, offset, 0L);
}

ssize_t preadv(int fd, const struct iovec *pieces, int count, off_t offset)
{
    return preadv64(fd, pieces, count, offset);
}

int ftruncate64(int fd, off_t length)
{
    if (fails(WRITING, is_ours(fd)))
        return -1;
    int result = (int)syscall(SYS_ftruncate, fd, length);
    char path[PATH_MAX];
    uint64_t inode = result ? 0 : inode_of(fd, path, S_IFREG);
    if (inode)
        note(TRUNCATE, NULL, NULL, 0, inode, (uint64_t)length);
    return result;
}

int ftruncate(int fd, off_t length)
{
    return ftruncate64(fd, length);
}

int fallocate64(int fd, int mode, off_t offset, off_t length)
{
    if (fails(WRITING, is_ours(fd)))
        return -1;
    struct stat before, after;
    char path[PATH_MAX];
    uint64_t inode = inode_of(fd, path, S_IFREG);
    if (inode && fstat(fd, &before))
        abort();
    int result = (int)syscall(SYS_fallocate, fd, mode, offset, length);
    if (!inode || result)
        return result;
    if (fstat(fd, &after) || (mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)))
        abort(); /* nobody does that */
    if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) {
        uint64_t size = (uint64_t)length;
        note(ZERO, NULL, &size, sizeof size, inode, (uint64_t)offset);
    }
    if (after.st_size != before.st_size)
        note(TRUNCATE, NULL, NULL, 0, inode, (uint64_t)after.st_size);
    return result;
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    return fallocate64(fd, mode, offset, length);
}

int posix_fallocate64(int fd, off_t offset, off_t length)
{
    return fallocate64(fd, 0, offset, length) ? errno : 0;
}

int posix_fallocate(int fd, off_t offset, off_t length)
{
    return posix_fallocate64(fd, offset, length);
}

/* -- what makes it durable */

static int synced(long call, int fd)
{
    if (fails(SYNCING, is_ours(fd)))
        return -1;
    static _Atomic uint64_t tokens;
    char path[PATH_MAX];
    uint64_t inode = inode_of(fd, path, 0), token = ((uint64_t)getpid() << 32) + ++tokens;
    struct stat found;
    if (inode && !fstat(fd, &found))
        note(SYNC_BEGINS, S_ISDIR(found.st_mode) ? path : NULL, NULL, 0, inode, token);
    int result = (int)syscall(call, fd);
    if (inode && !result)
        note(SYNC_ENDS, NULL, NULL, 0, inode, token);
    return result;
}

int fsync(int fd)
{
    return synced(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    return synced(SYS_fdatasync, fd);
}

/* -- names */

int renameat2(int old_at, const char *old, int new_at, const char *new, unsigned flags)
{
    if (fails(NAMING, is_named_ours(new_at, new)))
        return -1;
    char before[PATH_MAX], after[PATH_MAX];
    const char *from = ours(old_at, old, before), *to = ours(new_at, new, after);
    int result = (int)syscall(SYS_renameat2, old_at, old, new_at, new, flags);
    if (!result && from && to)
        note(RENAME, from, to, strlen(to), 0, 0);
    return result;
}

int renameat(int old_at, const char *old, int new_at, const char *new)
{
    return renameat2(old_at, old, new_at, new, 0);
}

int rename(const char *old, const char *new)
{
    return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int linkat(int old_at, const char *old, int new_at, const char *new, int flags)
{
    if (fails(NAMING, is_named_ours(new_at, new)))
        return -1;
    char after[PATH_MAX];
    const char *to = ours(new_at, new, after);
    int result = (int)syscall(SYS_linkat, old_at, old, new_at, new, flags);
    struct stat found;
    if (!result && to && !lstat(to, &found))
        note(LINK, to, NULL, 0, found.st_ino, 0);
    return result;
}

int link(const char *old, const char *new)
{
    return linkat(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int unlinkat(int at, const char *name, int flags)
{
    if (fails(REMOVING, is_named_ours(at, name)))
        return -1;
    char path[PATH_MAX];
    const char *mine = ours(at, name, path);
    int result = (int)syscall(SYS_unlinkat, at, name, flags);
    if (!result && mine)
        note(flags & AT_REMOVEDIR ? RMDIR : UNLINK, mine, NULL, 0, 0, 0);
    return result;
}

int unlink(const char *name)
{
    return unlinkat(AT_FDCWD, name, 0);
}

int rmdir(const char *name)
{
    return unlinkat(AT_FDCWD, name, AT_REMOVEDIR);
}

int mkdirat(int at, const char *name, mode_t mode)
{
    if (fails(NAMING, is_named_ours(at, name)))
        return -1;
    char path[PATH_MAX];
    const char *mine = ours(at, name, path);
    int result = (int)syscall(SYS_mkdirat, at, name, mode);
    if (!result && mine)
        note(MKDIR, mine, NULL, 0, 0, 0);
    return result;
}

int mkdir(const char *name, mode_t mode)
{
    return mkdirat(AT_FDCWD, name, mode);
}
