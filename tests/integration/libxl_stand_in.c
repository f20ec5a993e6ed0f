/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stands in for the functions of libxenlight that need Xen. Preloaded into libvirtd, it makes libvirtd's libxl driver
 * find a Xen 4.17 host. The functions that need no Xen (types, bitmaps, JSON) stay the real library's.
 *
 * doc/without_xen.rst lists its assumptions about the real library.
 *
 * Files in FOLDER (domain_table.h):
 *   events              FIFO; a line for each event
 *   commands            FIFO; "WHAT DOMID": a guest powers off, reboots, …; see obey()
 *   device-model-DOMID  FIFO; anything that a device model writes there means that it runs
 *   qemu-dm-NAME.log    its stdout and stderr
 *   userdata-DOMID-KEY  data that the toolstack keeps for a domain
 *   memory-DOMID        the guest's memory, a sparse file
 *   saved-NUMBER        the memory in a saved image
 */
#define _GNU_SOURCE
#include <errno.h>
#include <libxl.h>
#include <libxl_event.h>
#include <libxl_utils.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <sys/pidfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "domain_table.h"

#define KIB_PER_GIB (1 << 20)
#define CPUS 4
#define TABLES 0xfd001000 /* where the device model delivers ACPI tables */

/* What is in a saved image; the memory is in a file of that number. */
struct image {
    char state[24];
    unsigned number;
};

static const char STATE[24] = "a guest's saved state";

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const libxl_event_hooks *hooks;
static void *hooks_user;

/*
 * Give libvirtd's children the stand-ins for libxenctrl and libxenstore instead of this one. libvirtd itself must not
 * have them: its libxenlight is linked to the real ones. ld.so has read both variables before this runs.
 */
__attribute__((constructor)) static void set_environment_of_children(void)
{
    unsetenv("LD_PRELOAD");
    setenv("LD_LIBRARY_PATH", getenv("XEN_STAND_IN_LIBRARIES"), 1);
}

__attribute__((format(printf, 1, 2))) static void event(const char *format, ...)
{
    char line[512];
    va_list arguments;
    int fd = open(FOLDER "events", O_RDWR | O_CLOEXEC);
    size_t length;

    va_start(arguments, format);
    vsnprintf(line, sizeof(line) - 1, format, arguments);
    va_end(arguments);
    length = strlen(line);
    line[length++] = '\n';
    if (fd < 0 || write(fd, line, length) < 0)
        abort();
    close(fd);
}

/* --- the host --- */

int libxl_ctx_alloc(libxl_ctx **ctx, int version, unsigned flags, xentoollog_logger *logger)
{
    /* The remaining real functions only need it to exist. */
    *ctx = calloc(1, 1 << 16);
    return *ctx && domain_table() ? 0 : ERROR_FAIL;
}

int libxl_ctx_free(libxl_ctx *ctx)
{
    free(ctx);
    return 0;
}

const libxl_version_info *libxl_get_version_info(libxl_ctx *ctx)
{
    static char capabilities[] = "xen-3.0-x86_64 hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64";
    static libxl_version_info info;

    info.xen_version_major = 4;
    info.xen_version_minor = 17;
    info.xen_version_extra = "";
    info.pagesize = 4096;
    info.commandline = "";
    /* libvirt splits it with strtok_r at each call (libxl_capabilities.c:libxlCapsInitGuests) */
    info.capabilities = strdup(capabilities);
    return &info;
}

int libxl_get_physinfo(libxl_ctx *ctx, libxl_physinfo *info)
{
    info->threads_per_core = 1;
    info->cores_per_socket = info->nr_cpus = CPUS;
    info->nr_nodes = 1;
    info->cpu_khz = 2000000;
    info->total_pages = 4 * (KIB_PER_GIB / 4);
    return 0;
}

libxl_cputopology *libxl_get_cpu_topology(libxl_ctx *ctx, int *count)
{
    libxl_cputopology *topology = calloc(CPUS, sizeof(*topology));

    for (int cpu = 0; cpu < CPUS; cpu++)
        topology[cpu].core = cpu;
    *count = CPUS;
    return topology;
}

libxl_numainfo *libxl_get_numainfo(libxl_ctx *ctx, int *count)
{
    libxl_numainfo *info = calloc(1, sizeof(*info));

    info->size = 4ull * KIB_PER_GIB * 1024;
    *count = 1;
    return info;
}

int libxl_get_max_cpus(libxl_ctx *ctx)
{
    return CPUS;
}

int libxl_get_max_nodes(libxl_ctx *ctx)
{
    return 1;
}

int libxl_get_free_memory(libxl_ctx *ctx, uint64_t *kib)
{
    *kib = 3 * KIB_PER_GIB;
    return 0;
}

int libxl_domain_need_memory(libxl_ctx *ctx, libxl_domain_config *config, uint32_t domid, uint64_t *kib)
{
    *kib = config->b_info.max_memkb;
    return 0;
}

/* --- events --- */

void libxl_osevent_register_hooks(libxl_ctx *ctx, const libxl_osevent_hooks *osevent_hooks, void *user)
{
}

void libxl_childproc_setmode(libxl_ctx *ctx, const libxl_childproc_hooks *childproc_hooks, void *user)
{
}

static void raise_event(libxl_event_type type, const struct domain *domain)
{
    libxl_event *raised;

    if (!domain->watched)
        return;
    raised = calloc(1, sizeof(*raised));
    raised->type = type;
    raised->domid = domain->domid;
    memcpy(libxl_uuid_bytearray(&raised->domuuid), domain->uuid, sizeof(domain->uuid));
    if (type == LIBXL_EVENT_TYPE_DOMAIN_SHUTDOWN)
        raised->u.domain_shutdown.shutdown_reason = domain->shutdown_reason;
    hooks->event_occurs(hooks_user, raised);
}

static void remove_domain(struct domain *domain);

/* Carry out an event in a guest, or an action on it that does not come from libvirt. */
static void obey(const char *what, uint32_t domid)
{
    static const struct {
        const char *what;
        libxl_shutdown_reason reason;
    } shutdowns[] = {
        { "poweroff", LIBXL_SHUTDOWN_REASON_POWEROFF }, { "reboot", LIBXL_SHUTDOWN_REASON_REBOOT },
        { "suspend", LIBXL_SHUTDOWN_REASON_SUSPEND },   { "crash", LIBXL_SHUTDOWN_REASON_CRASH },
        { "soft-reset", LIBXL_SHUTDOWN_REASON_SOFT_RESET },
    };
    struct domain *domain = domid ? find_domain(domid) : NULL;

    event("guest %s %u", what, domid);
    if (!domain)
        return;
    if (!strcmp(what, "death")) {
        struct domain dead = *domain;

        remove_domain(domain);
        raise_event(LIBXL_EVENT_TYPE_DOMAIN_DEATH, &dead);
        return;
    }
    for (size_t n = 0; n < sizeof(shutdowns) / sizeof(*shutdowns); n++)
        if (!strcmp(what, shutdowns[n].what)) {
            domain->shutdown_reason = shutdowns[n].reason;
            raise_event(LIBXL_EVENT_TYPE_DOMAIN_SHUTDOWN, domain);
        }
}

static void *read_commands(void *unused)
{
    FILE *commands = fopen(FOLDER "commands", "r+e");
    char what[32];
    uint32_t domid;

    /* A lock would be held while it waits: since glibc 2.41, exit() waits for it. */
    if (commands)
        __fsetlocking(commands, FSETLOCKING_BYCALLER);
    while (commands && fscanf(commands, "%31s %u", what, &domid) == 2)
        obey(what, domid);
    return NULL;
}

static void command(const char *what, uint32_t domid)
{
    FILE *commands = fopen(FOLDER "commands", "r+e");

    fprintf(commands, "%s %u\n", what, domid);
    fclose(commands);
}

void libxl_event_register_callbacks(libxl_ctx *ctx, const libxl_event_hooks *event_hooks, void *user)
{
    pthread_t thread;

    hooks = event_hooks;
    hooks_user = user;
    pthread_create(&thread, NULL, read_commands, NULL);
}

int libxl_evenable_domain_death(libxl_ctx *ctx, uint32_t domid, libxl_ev_user user, libxl_evgen_domain_death **watch)
{
    struct domain *domain = find_domain(domid);

    if (!domain)
        return ERROR_DOMAIN_NOTFOUND;
    domain->watched = 1;
    *watch = (libxl_evgen_domain_death *)domain;
    return 0;
}

void libxl_evdisable_domain_death(libxl_ctx *ctx, libxl_evgen_domain_death *watch)
{
    ((struct domain *)watch)->watched = 0;
}

/* --- the device model --- */

static void add_arguments(char **argv, size_t *argc, libxl_string_list extra, size_t limit)
{
    for (size_t n = 0; extra && extra[n] && *argc + 1 < limit; n++)
        argv[(*argc)++] = extra[n];
}

/*
 * Wait until the device model writes to its FIFO, as libxl waits until QEMU writes "running" to xenstore, with the same
 * timeout (libxl_internal.h: LIBXL_DEVICE_MODEL_START_TIMEOUT). One that ends earlier, with any status, has failed
 * (libxl_exec.c:spawn_middle_death).
 */
static int wait_for_device_model(uint32_t domid, pid_t pid, int running)
{
    struct pollfd wait[] = { { .fd = running, .events = POLLIN }, { .fd = pidfd_open(pid, 0), .events = POLLIN } };
    int status = 0, ready;

    do
        ready = poll(wait, 2, 60000);
    while (ready < 0 && errno == EINTR);
    close(wait[1].fd);
    if (wait[0].revents & POLLIN) {
        event("device-model %u runs", domid);
        return 0;
    }
    if (ready <= 0)
        kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    event("device-model %u %s %d", domid, WIFEXITED(status) ? "exits" : "dies of signal",
          WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
    return ERROR_FAIL;
}

static pid_t spawn(char **argv, const char *name)
{
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    sigset_t none, all;
    char log[128];
    pid_t pid;

    snprintf(log, sizeof(log), FOLDER "qemu-dm-%s.log", name);
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 1, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    posix_spawn_file_actions_adddup2(&files, 1, 2);
    posix_spawn_file_actions_addclosefrom_np(&files, 3);
    /* libvirtd's threads block and handle signals (libxl_exec.c:libxl__exec resets both, too) */
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID);
    if (posix_spawn(&pid, argv[0], &files, &attributes, argv, environ))
        pid = 0;
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attributes);
    return pid;
}

/* Run the emulator with those of libxl's arguments that a device model in front of QEMU reads (libxl_dm.c). */
static int run_device_model(struct domain *domain, const libxl_domain_config *config, bool restored)
{
    const libxl_domain_build_info *info = &config->b_info;
    char domid[16], fifo[64];
    char *argv[64] = { info->device_model, "-xen-domid", domid,      "-no-shutdown",
                       "-name",            domain->name, "-machine", "xenfv" };
    size_t argc = 8, limit = sizeof(argv) / sizeof(*argv);
    int running, rc = ERROR_FAIL;

    if (!info->device_model || access(info->device_model, X_OK))
        return ERROR_FAIL;
    snprintf(domid, sizeof(domid), "%u", domain->domid);
    snprintf(fifo, sizeof(fifo), FOLDER "device-model-%u", domain->domid);
    add_arguments(argv, &argc, info->extra, limit - 2);
    add_arguments(argv, &argc, info->extra_hvm, limit - 2);
    if (restored) {
        argv[argc++] = "-incoming";
        argv[argc++] = "fd:0";
    }
    if (mkfifo(fifo, 0600) && errno != EEXIST)
        return ERROR_FAIL;
    running = open(fifo, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    domain->device_model = spawn(argv, domain->name);
    if (domain->device_model)
        rc = wait_for_device_model(domain->domid, domain->device_model, running);
    if (rc)
        domain->device_model = 0;
    close(running);
    return rc;
}

static void end_device_model(struct domain *domain)
{
    if (!domain->device_model)
        return;
    kill(domain->device_model, SIGHUP); /* libxl_dm.c:kill_device_model */
    waitpid(domain->device_model, NULL, 0); /* ECHILD for a child of an earlier libvirtd */
    domain->device_model = 0;
}

/* --- userdata --- */

static void userdata_path(char path[128], uint32_t domid, const char *key)
{
    snprintf(path, 128, FOLDER "userdata-%u-%s", domid, key);
}

int libxl_userdata_store(libxl_ctx *ctx, uint32_t domid, const char *key, const uint8_t *data, int length)
{
    char path[128];
    FILE *file;

    userdata_path(path, domid, key);
    file = fopen(path, "we");
    if (!file || fwrite(data, 1, length, file) != length)
        return ERROR_FAIL;
    return fclose(file) ? ERROR_FAIL : 0;
}

int libxl_userdata_retrieve(libxl_ctx *ctx, uint32_t domid, const char *key, uint8_t **data, int *length)
{
    char path[128];
    FILE *file;
    size_t size = 1 << 20;

    *data = NULL;
    *length = 0;
    userdata_path(path, domid, key);
    file = fopen(path, "re");
    if (!file) /* missing userdata is no error (libxl_dom.c:libxl__userdata_retrieve) */
        return find_domain(domid) ? 0 : ERROR_DOMAIN_NOTFOUND;
    *data = calloc(1, size);
    *length = fread(*data, 1, size - 1, file);
    fclose(file);
    return 0;
}

/* --- the guest's memory --- */

static void copy_memory(const char *from, const char *to)
{
    char command[200];

    snprintf(command, sizeof(command), "cp --sparse=always %s %s", from, to);
    if (system(command))
        abort();
}

static void add_checksum(uint8_t *table, size_t length, size_t at)
{
    uint8_t sum = 0;

    for (size_t n = 0; n < length; n++)
        sum += table[n];
    table[at] -= sum;
}

/* Do what hvmloader does with the tables that it finds: an RSDT names them, and the RSDP in the BIOS area that one. */
static void run_firmware(uint32_t domid)
{
    static const uint32_t rsdt_at = 0xe1000;
    char path[64];
    uint8_t *memory, *rsdp, *rsdt;
    uint32_t count = 0, length;
    int fd;

    memory_path(path, domid);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    memory = mmap(NULL, MEMORY_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    close(fd);
    if (memory == MAP_FAILED)
        abort();
    rsdp = memory + 0xe0000;
    rsdt = memory + rsdt_at;
    for (uint32_t at = TABLES; memcpy(&length, memory + at + 4, 4), length; at += length)
        memcpy(rsdt + 36 + 4 * count++, &at, 4);
    length = 36 + 4 * count;
    memcpy(rsdt, "RSDT", 4);
    memcpy(rsdt + 4, &length, 4);
    add_checksum(rsdt, length, 9);
    memcpy(rsdp, "RSD PTR ", 8);
    memcpy(rsdp + 16, &rsdt_at, 4);
    add_checksum(rsdp, 20, 8);
    munmap(memory, MEMORY_SIZE);
}

/* --- domains --- */

static void remove_domain(struct domain *domain)
{
    static const char *const keys[] = { "libvirt-xml", "libxl-json" };
    char path[128];

    end_device_model(domain);
    for (size_t n = 0; n < sizeof(keys) / sizeof(*keys); n++) {
        userdata_path(path, domain->domid, keys[n]);
        unlink(path);
    }
    snprintf(path, sizeof(path), FOLDER "device-model-%u", domain->domid);
    unlink(path);
    memory_path(path, domain->domid);
    unlink(path);
    memset(domain, 0, sizeof(*domain));
}

static bool name_is_used(const char *name)
{
    const struct domain_table *table = domain_table();

    for (size_t n = 0; n < DOMAINS; n++)
        if (table->domains[n].domid && !strcmp(table->domains[n].name, name))
            return true;
    return false;
}

/* Two domains cannot have the same name (libxl_create.c:libxl__domain_make, libxl.c:libxl__domain_rename). */
static struct domain *add_domain(const libxl_domain_config *config)
{
    struct domain *domain;

    pthread_mutex_lock(&lock);
    domain = name_is_used(config->c_info.name) ? NULL : find_domain(0);
    if (domain) {
        domain->domid = ++domain_table()->last_domid;
        memcpy(domain->uuid, libxl_uuid_bytearray_const(&config->c_info.uuid), sizeof(domain->uuid));
        snprintf(domain->name, sizeof(domain->name), "%s", config->c_info.name);
        domain->paused = 1;
        domain->shutdown_reason = RUNS;
        domain->memory_kib = config->b_info.max_memkb;
    }
    pthread_mutex_unlock(&lock);
    return domain;
}

/*
 * The order is libxl's: first the domain exists, paused, with its uuid in xenstore and its memory built. Then its
 * device model is run. When that fails, the domain is destroyed and the device model's error is returned
 * (tools/libs/light/libxl_create.c: domcreate_devmodel_started, domcreate_complete).
 *
 * restored: the number of the saved image, or 0
 */
static int create(libxl_ctx *ctx, libxl_domain_config *config, uint32_t *domid, unsigned restored)
{
    struct domain *domain = config->c_info.type == LIBXL_DOMAIN_TYPE_HVM ? add_domain(config) : NULL;
    char *json, from[64], to[64];
    int rc;

    if (!domain)
        return ERROR_INVAL;
    event("%s %s %u", restored ? "restore" : "create", domain->name, domain->domid);
    json = libxl_domain_config_to_json(ctx, config);
    rc = libxl_userdata_store(ctx, domain->domid, "libxl-json", (uint8_t *)json, strlen(json) + 1);
    free(json);
    if (restored) {
        snprintf(from, sizeof(from), FOLDER "saved-%u", restored);
        memory_path(to, domain->domid);
        copy_memory(from, to);
        domain->booted = 1;
    }
    if (!rc)
        rc = run_device_model(domain, config, restored);
    if (rc) {
        event("destroy %u", domain->domid);
        remove_domain(domain);
        return rc;
    }
    *domid = domain->domid;
    return 0;
}

int libxl_domain_create_new(libxl_ctx *ctx, libxl_domain_config *config, uint32_t *domid,
                            const libxl_asyncop_how *how, const libxl_asyncprogress_how *console)
{
    return create(ctx, config, domid, 0);
}

int libxl_domain_create_restore(libxl_ctx *ctx, libxl_domain_config *config, uint32_t *domid, int restore_fd,
                                int send_back_fd, const libxl_domain_restore_params *params,
                                const libxl_asyncop_how *how, const libxl_asyncprogress_how *console)
{
    struct image image;

    if (read(restore_fd, &image, sizeof(image)) != sizeof(image) || memcmp(image.state, STATE, sizeof(STATE)))
        return ERROR_FAIL;
    return create(ctx, config, domid, image.number);
}

int libxl_domain_suspend(libxl_ctx *ctx, uint32_t domid, int fd, int flags, const libxl_asyncop_how *how)
{
    struct domain *domain = find_domain(domid);
    struct image image = { .number = ++domain_table()->last_image };
    char from[64], to[64];

    event("save %u", domid);
    memcpy(image.state, STATE, sizeof(STATE));
    if (!domain || write(fd, &image, sizeof(image)) != sizeof(image))
        return ERROR_FAIL;
    memory_path(from, domid);
    snprintf(to, sizeof(to), FOLDER "saved-%u", image.number);
    copy_memory(from, to);
    /* The guest has shut down for this reason, which libxl reports like any other; libvirt ignores it. */
    domain->shutdown_reason = LIBXL_SHUTDOWN_REASON_SUSPEND;
    raise_event(LIBXL_EVENT_TYPE_DOMAIN_SHUTDOWN, domain);
    return 0;
}

int libxl_retrieve_domain_configuration(libxl_ctx *ctx, uint32_t domid, libxl_domain_config *config,
                                        const libxl_asyncop_how *how)
{
    uint8_t *json;
    int length, rc = libxl_userdata_retrieve(ctx, domid, "libxl-json", &json, &length);

    if (!rc)
        rc = json ? libxl_domain_config_from_json(ctx, config, (char *)json) : ERROR_FAIL;
    free(json);
    return rc;
}

/* The domain keeps its domid; its device model is ended and run again (libxl_create.c:do_domain_soft_reset). */
int libxl_domain_soft_reset(libxl_ctx *ctx, libxl_domain_config *config, uint32_t domid, const libxl_asyncop_how *how,
                            const libxl_asyncprogress_how *console)
{
    struct domain *domain = find_domain(domid);

    event("soft-reset %u", domid);
    if (!domain)
        return ERROR_DOMAIN_NOTFOUND;
    end_device_model(domain);
    domain->paused = 1;
    domain->shutdown_reason = RUNS;
    return run_device_model(domain, config, true);
}

int libxl_domain_destroy(libxl_ctx *ctx, uint32_t domid, const libxl_asyncop_how *how)
{
    struct domain *domain = find_domain(domid);

    event("destroy %u", domid);
    if (!domain)
        return ERROR_DOMAIN_NOTFOUND;
    remove_domain(domain);
    return 0;
}

static int set_paused(const char *what, uint32_t domid, int paused)
{
    struct domain *domain = find_domain(domid);

    event("%s %u", what, domid);
    if (!domain)
        return ERROR_DOMAIN_NOTFOUND;
    domain->paused = paused;
    return 0;
}

int libxl_domain_pause(libxl_ctx *ctx, uint32_t domid, const libxl_asyncop_how *how)
{
    return set_paused("pause", domid, 1);
}

int libxl_domain_unpause(libxl_ctx *ctx, uint32_t domid, const libxl_asyncop_how *how)
{
    struct domain *domain = find_domain(domid);

    if (domain && !domain->booted)
        run_firmware(domid);
    if (domain)
        domain->booted = 1;
    return set_paused("unpause", domid, 0);
}

/* The guest obeys at once. */
static int ask_guest(const char *what, uint32_t domid)
{
    event("ask %u to %s", domid, what);
    if (!find_domain(domid))
        return ERROR_DOMAIN_NOTFOUND;
    command(what, domid);
    return 0;
}

int libxl_domain_shutdown(libxl_ctx *ctx, uint32_t domid, const libxl_asyncop_how *how)
{
    return ask_guest("poweroff", domid);
}

int libxl_domain_reboot(libxl_ctx *ctx, uint32_t domid, const libxl_asyncop_how *how)
{
    return ask_guest("reboot", domid);
}

int libxl_domain_info(libxl_ctx *ctx, libxl_dominfo *info, uint32_t domid)
{
    static const struct domain dom0 = { .shutdown_reason = RUNS, .memory_kib = KIB_PER_GIB };
    const struct domain *domain = domid ? find_domain(domid) : &dom0;

    if (!domain)
        return ERROR_DOMAIN_NOTFOUND;
    info->domid = domid;
    info->paused = domain->paused;
    info->running = !domain->paused && domain->shutdown_reason == RUNS;
    info->shutdown = domain->shutdown_reason != RUNS;
    info->shutdown_reason = info->shutdown ? domain->shutdown_reason : LIBXL_SHUTDOWN_REASON_UNKNOWN;
    info->current_memkb = info->max_memkb = domain->memory_kib;
    info->vcpu_online = 1;
    return 0;
}

int libxl_set_memory_target(libxl_ctx *ctx, uint32_t domid, int64_t kib, int relative, int enforce)
{
    struct domain *domain = domid ? find_domain(domid) : NULL;

    event("memory %u %lld", domid, (long long)kib);
    if (!domain)
        return ERROR_DOMAIN_NOTFOUND;
    domain->memory_kib = relative ? domain->memory_kib + kib : kib;
    return 0;
}

int libxl_set_vcpuaffinity(libxl_ctx *ctx, uint32_t domid, uint32_t vcpu, const libxl_bitmap *hard,
                           const libxl_bitmap *soft)
{
    return 0;
}

libxl_device_disk *libxl_device_disk_list(libxl_ctx *ctx, uint32_t domid, int *count)
{
    *count = 0;
    return NULL;
}
