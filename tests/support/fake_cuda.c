/* A CUDA driver without a GPU, compiled against the real cuda.h: memory is the host's, kernels are called back.

   Work in a stream is queued and runs when someone waits, as late as the real driver may run it: who reads a
   result too early, or changes what a copy still has to read, sees it here.  Everything is written to a log. */
#include <cuda.h>
#include <elf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cuEventElapsedTime

#define EXPORT __attribute__((visibility("default")))
enum { MOST = 64 };

EXPORT int fake_version = 12080, fake_count = 1, fake_init = 0;
EXPORT int fake_attributes[256];
EXPORT size_t fake_memory = (size_t)1 << 33;
EXPORT double fake_milliseconds = 0; /* the GPU's clock: one a kernel, and what a kernel adds */
EXPORT int fake_turns = 100000;      /* an endless loop is an error here */
EXPORT int fake_refused = 0;         /* the status that every launch returns */
typedef void (*Hook)(const char *name, unsigned long long digest, const unsigned *grid, int threads, int shared, void **params);
EXPORT Hook fake_hook = 0;
static size_t held = 0;
static int live = 0; /* allocations, modules, graphs, events that nobody gave back */
EXPORT int fake_live(void) { return live; }

static char *text = 0;
static size_t used = 0, room = 0;
static void say(const char *format, ...) {
  va_list list;
  if (room < used + 512) text = realloc(text, room = 2 * room + 4096);
  va_start(list, format);
  used += vsnprintf(text + used, 512, format, list);
  va_end(list);
}
EXPORT const char *fake_log(void) { return text ? text : ""; }
EXPORT void fake_forget(void) { used = 0; if (text) *text = 0; }

struct CUfunc_st { char name[128]; unsigned long long digest; int count, sizes[MOST]; };
/* Of a module's bytes: two kernels may have one name. */
EXPORT unsigned long long fake_digest(const unsigned char *at, size_t size) {
  unsigned long long x = 14695981039346656037ull;
  for (size_t i = 0; i < size; ++i) x = (x ^ at[i]) * 1099511628211ull;
  return x;
}
typedef struct Memory { char *at; size_t size; int pinned; struct Memory *next; } Memory;
static Memory *memory = 0;
typedef struct Node {
  int kind; /* of CUgraphNodeType */
  CUfunction function;
  unsigned grid[3], threads, shared;
  unsigned char *values;
  char *target, *staged;
  const char *source;
  size_t size;
  struct CUgraph_st *body;
  CUevent event;
  struct Node *next;
} Node;
struct CUgraph_st { Node *first, *last; int condition, dead, instances; };
struct CUgraphExec_st { CUgraph graph; };
struct CUevent_st { double time; int recorded; };
enum { SET = 100, RECORD, LAUNCH };

static Memory *find(const void *at) {
  for (Memory *m = memory; m; m = m->next)
    if ((char *)at >= m->at && (char *)at < m->at + (m->size ? m->size : 1)) return m;
  return 0;
}
EXPORT size_t fake_extent(const void *at) { /* bytes from here to the end of the allocation */
  Memory *m = find(at);
  return m ? m->at + m->size - (char *)at : 0;
}
static int inside(const void *at, size_t size, int pinned) {
  Memory *m = find(at);
  return m && m->pinned == pinned && (char *)at + size <= m->at + m->size;
}

static CUresult run(Node *first);
static CUresult run_kernel(Node *node) {
  void *params[MOST];
  int at = 0;
  for (int i = 0; i < node->function->count; ++i) {
    params[i] = node->values + at;
    at += node->function->sizes[i];
  }
  const unsigned *g = node->grid;
  say("run %s %u %u %u x %u shared %u\n", node->function->name, g[0], g[1], g[2], node->threads, node->shared);
  fake_milliseconds += 1;
  if (!strcmp(node->function->name, "set_condition")) {
    CUgraph body = *(CUgraph *)params[0];
    body->condition = **(int **)params[1];
  } else if (fake_hook) {
    fake_hook(node->function->name, node->function->digest, node->grid, node->threads, node->shared, params);
  }
  return 0;
}
static CUresult run(Node *first) {
  for (Node *node = first; node; node = node->next) {
    CUresult status = 0;
    if (node->kind == CU_GRAPH_NODE_TYPE_KERNEL) status = run_kernel(node);
    if (node->kind == CU_GRAPH_NODE_TYPE_MEMCPY) {
      say("copy %zu\n", node->size);
      memcpy(node->target, node->staged ? node->staged : node->source, node->size);
    }
    if (node->kind == SET) memset(node->target, (int)node->shared, node->size);
    if (node->kind == RECORD) node->event->time = fake_milliseconds, node->event->recorded = 1;
    if (node->kind == LAUNCH) say("graph\n"), status = run(node->body->first);
    if (node->kind == CU_GRAPH_NODE_TYPE_CONDITIONAL) {
      int turns = 0;
      for (node->body->condition = 1; node->body->condition; ++turns) {
        if (turns == fake_turns) return CUDA_ERROR_LAUNCH_TIMEOUT;
        say("turn %d\n", turns);
        if ((status = run(node->body->first))) return status;
      }
    }
    if (status) return status;
  }
  return 0;
}

static Node *queue = 0, **queue_end = &queue;
static Node *put(int kind) {
  Node *node = calloc(1, sizeof *node);
  node->kind = kind;
  *queue_end = node;
  queue_end = &node->next;
  return node;
}
static CUresult drain(void) {
  Node *first = queue;
  queue = 0, queue_end = &queue;
  CUresult status = run(first);
  while (first) {
    Node *next = first->next;
    free(first->values), free(first->staged), free(first);
    first = next;
  }
  return status;
}
static unsigned char *copy_values(CUfunction function, void **params) {
  int size = 0, at = 0;
  for (int i = 0; i < function->count; ++i) size += function->sizes[i];
  unsigned char *out = malloc(size + 1);
  for (int i = 0; i < function->count; ++i) {
    memcpy(out + at, params[i], function->sizes[i]);
    at += function->sizes[i];
  }
  return out;
}

EXPORT CUresult cuInit(unsigned flags) { return fake_init; }
EXPORT CUresult cuDriverGetVersion(int *out) { return *out = fake_version, 0; }
EXPORT CUresult cuGetErrorString(CUresult status, const char **out) { return *out = "a fake error", 0; }
EXPORT CUresult cuDeviceGetCount(int *out) { return *out = fake_count, 0; }
EXPORT CUresult cuDeviceGet(CUdevice *out, int ordinal) { return *out = ordinal, 0; }
EXPORT CUresult cuDeviceGetName(char *out, int size, CUdevice d) { return snprintf(out, size, "Fake GPU"), 0; }
EXPORT CUresult cuDeviceGetAttribute(int *out, CUdevice_attribute a, CUdevice d) { return *out = fake_attributes[a], 0; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice d) { return *out = (CUcontext)0xC0, 0; }
EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice d) { return 0; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return context == (CUcontext)0xC0 ? 0 : CUDA_ERROR_INVALID_CONTEXT; }
EXPORT CUresult cuMemGetInfo(size_t *free_, size_t *total) { return *free_ = fake_memory - held, *total = fake_memory, 0; }

static void *add(size_t size, int pinned) {
  Memory *m = malloc(sizeof *m);
  *m = (Memory){aligned_alloc(256, (size + 511) / 256 * 256), size, pinned, memory};
  memset(m->at, 0xCB, size); /* whoever takes it for zero is seen */
  return ++live, memory = m, m->at;
}
static CUresult drop(void *at, int pinned) {
  for (Memory **m = &memory; *m; m = &(*m)->next)
    if ((*m)->at == at && (*m)->pinned == pinned) {
      Memory *gone = *m;
      if (!pinned) held -= gone->size;
      memset(gone->at, 0xDD, gone->size);
      *m = gone->next;
      free(gone->at), free(gone);
      return --live, 0;
    }
  return CUDA_ERROR_INVALID_VALUE;
}
EXPORT CUresult cuMemAlloc(CUdeviceptr *out, size_t size) {
  if (held + size > fake_memory) return CUDA_ERROR_OUT_OF_MEMORY;
  held += size;
  return *out = (CUdeviceptr)add(size, 0), 0;
}
EXPORT CUresult cuMemFree(CUdeviceptr at) { return queue ? CUDA_ERROR_ILLEGAL_STATE : drop((void *)at, 0); }
EXPORT CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags) { return *out = add(size, 1), 0; }
EXPORT CUresult cuMemFreeHost(void *at) { return queue ? CUDA_ERROR_ILLEGAL_STATE : drop(at, 1); }
EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void *source, size_t size, CUstream s) {
  if (!inside((void *)target, size, 0)) return CUDA_ERROR_INVALID_VALUE;
  Node *node = put(CU_GRAPH_NODE_TYPE_MEMCPY);
  node->target = (char *)target, node->source = source, node->size = size;
  if (!inside(source, size, 1)) memcpy(node->staged = malloc(size + 1), source, size);
  return 0;
}
EXPORT CUresult cuMemcpyDtoHAsync(void *target, CUdeviceptr source, size_t size, CUstream s) {
  if (!inside((void *)source, size, 0)) return CUDA_ERROR_INVALID_VALUE;
  Node *node = put(CU_GRAPH_NODE_TYPE_MEMCPY);
  node->target = target, node->source = (char *)source, node->size = size;
  return inside(target, size, 1) ? 0 : drain();
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t size, CUstream s) {
  if (!inside((void *)target, size, 0)) return CUDA_ERROR_INVALID_VALUE;
  Node *node = put(SET);
  return node->target = (char *)target, node->shared = value, node->size = size, 0;
}
EXPORT CUresult cuStreamCreate(CUstream *out, unsigned flags) { return *out = (CUstream)0x57, 0; }
EXPORT CUresult cuStreamDestroy(CUstream s) { return 0; }
EXPORT CUresult cuStreamSynchronize(CUstream s) { return s == (CUstream)0x57 ? drain() : CUDA_ERROR_INVALID_HANDLE; }
EXPORT CUresult cuEventCreate(CUevent *out, unsigned flags) { return ++live, *out = calloc(1, sizeof **out), 0; }
EXPORT CUresult cuEventDestroy(CUevent event) { return --live, free(event), 0; }
EXPORT CUresult cuEventRecord(CUevent event, CUstream s) { return put(RECORD)->event = event, event->recorded = 0, 0; }
EXPORT CUresult cuEventSynchronize(CUevent event) { return drain(); }
EXPORT CUresult cuEventElapsedTime(float *out, CUevent a, CUevent b) {
  if (!a->recorded || !b->recorded) return CUDA_ERROR_NOT_READY;
  return *out = (float)(b->time - a->time), 0;
}

struct CUmod_st { const char *image; char *copy; size_t size; };
static int arch_of(const Elf64_Ehdr *head) {
  unsigned flags = head->e_ident[8] >= 8 ? head->e_flags >> 8 : head->e_flags;
  return flags & 0xFF;
}
EXPORT CUresult cuModuleLoadData(CUmodule *out, const void *image) {
  int arch = fake_attributes[75] * 10 + fake_attributes[76];
  int elf = !memcmp(image, "\177ELF", 4);
  if (!elf && memcmp(image, ".version", 8)) return CUDA_ERROR_INVALID_IMAGE;
  if (!elf && fake_version < 12040) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
  if (elf && arch_of(image) != arch) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  CUmodule module = calloc(1, sizeof *module);
  size_t size = elf ? 0 : strlen(image) + 1;
  if (elf) {
    const Elf64_Ehdr *head = image;
    const Elf64_Shdr *section = (void *)((char *)image + head->e_shoff);
    size = head->e_shoff + (size_t)head->e_shnum * sizeof *section;
    if (head->e_phnum && head->e_phoff + head->e_phnum * sizeof(Elf64_Phdr) > size)
      size = head->e_phoff + head->e_phnum * sizeof(Elf64_Phdr);
    for (int i = 0; i < head->e_shnum; ++i)
      if (section[i].sh_type != SHT_NOBITS && section[i].sh_offset + section[i].sh_size > size)
        size = section[i].sh_offset + section[i].sh_size;
  }
  module->image = module->copy = memcpy(malloc(size), image, size);
  module->size = size;
  return ++live, *out = module, 0;
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return --live, free(module->copy), free(module), 0; }
EXPORT CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
  CUfunction function = calloc(1, sizeof *function); /* as the real one's, gone with the process */
  snprintf(function->name, sizeof function->name, "%s", name);
  function->digest = fake_digest((void *)module->image, module->size);
  *out = function;
  if (memcmp(module->image, "\177ELF", 4)) {
    const char *end = strchr(module->image, '{'), *at = strstr(module->image, ".entry");
    while ((at = strstr(at + 1, ".param .u64")) && at < end) function->sizes[function->count++] = 8;
    return strstr(module->image, name) ? 0 : CUDA_ERROR_NOT_FOUND;
  }
  const Elf64_Ehdr *head = (void *)module->image;
  const Elf64_Shdr *section = (void *)(module->image + head->e_shoff);
  const char *names = module->image + section[head->e_shstrndx].sh_offset;
  for (int i = 0; i < head->e_shnum; ++i) {
    const char *called = names + section[i].sh_name;
    if (strncmp(called, ".nv.info.", 9) || strcmp(called + 9, name)) continue;
    const unsigned char *at = (void *)(module->image + section[i].sh_offset), *end = at + section[i].sh_size;
    while (at + 4 <= end) {
      unsigned length = at[0] == 4 ? at[2] | at[3] << 8 : 0, flags;
      unsigned short ordinal;
      if (at[0] == 4 && at[1] == 0x17) {
        memcpy(&ordinal, at + 8, 2), memcpy(&flags, at + 12, 4);
        function->sizes[ordinal] = (int)(flags >> 18);
        if (ordinal >= function->count) function->count = ordinal + 1;
      }
      at += 4 + length;
    }
    return 0;
  }
  return CUDA_ERROR_NOT_FOUND;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute a, int value) {
  return say("attribute %s %d %d\n", function->name, (int)a, value), 0;
}
static void fill(Node *node, CUfunction f, const unsigned *grid, unsigned threads, unsigned shared, void **params) {
  node->function = f, node->threads = threads, node->shared = shared;
  memcpy(node->grid, grid, sizeof node->grid);
  node->values = copy_values(f, params);
}
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                               unsigned shared, CUstream s, void **params, void **extra) {
  unsigned grid[3] = {x, y, z};
  if (fake_refused) return fake_refused;
  if (!x || !y || !z || by != 1 || bz != 1) return CUDA_ERROR_INVALID_VALUE;
  return fill(put(CU_GRAPH_NODE_TYPE_KERNEL), f, grid, bx, shared, params), 0;
}

static CUresult append(CUgraph graph, Node *node, CUgraphNode *out, const CUgraphNode *before, size_t count) {
  /* A chain: each node depends on the one before it and on nothing else. */
  if (count != (graph->last ? 1u : 0u) || (count && *before != (CUgraphNode)graph->last)) return CUDA_ERROR_INVALID_VALUE;
  if (graph->last) graph->last->next = node; else graph->first = node;
  return graph->last = node, *out = (CUgraphNode)node, 0;
}
static Node *make(int kind) { Node *node = calloc(1, sizeof *node); return node->kind = kind, node; }
EXPORT CUresult cuGraphCreate(CUgraph *out, unsigned flags) { return ++live, *out = calloc(1, sizeof **out), 0; }
static void release(CUgraph graph) {
  if (!graph->dead || graph->instances) return;
  for (Node *node = graph->first, *next; node; node = next) {
    next = node->next;
    if (node->body) node->body->dead = 1, release(node->body);
    free(node->values), free(node);
  }
  free(graph);
}
EXPORT CUresult cuGraphDestroy(CUgraph graph) { return --live, graph->dead = 1, release(graph), 0; }
EXPORT CUresult cuGraphAddKernelNode(CUgraphNode *out, CUgraph graph, const CUgraphNode *before, size_t count,
                                     const CUDA_KERNEL_NODE_PARAMS *p) {
  unsigned grid[3] = {p->gridDimX, p->gridDimY, p->gridDimZ};
  if (!grid[0] || !grid[1] || !grid[2] || p->blockDimY != 1 || p->blockDimZ != 1 || p->extra) return CUDA_ERROR_INVALID_VALUE;
  Node *node = make(CU_GRAPH_NODE_TYPE_KERNEL);
  fill(node, p->func, grid, p->blockDimX, p->sharedMemBytes, p->kernelParams);
  say("node kernel %s\n", p->func->name);
  return append(graph, node, out, before, count);
}
EXPORT CUresult cuGraphAddMemcpyNode(CUgraphNode *out, CUgraph graph, const CUgraphNode *before, size_t count,
                                     const CUDA_MEMCPY3D *p, CUcontext context) {
  Node *node = make(CU_GRAPH_NODE_TYPE_MEMCPY);
  int over = p->srcMemoryType == CU_MEMORYTYPE_HOST && p->dstMemoryType == CU_MEMORYTYPE_DEVICE;
  int back = p->srcMemoryType == CU_MEMORYTYPE_DEVICE && p->dstMemoryType == CU_MEMORYTYPE_HOST;
  if (!over && !back) return CUDA_ERROR_INVALID_VALUE;
  if (p->Height != 1 || p->Depth != 1 || context != (CUcontext)0xC0) return CUDA_ERROR_INVALID_VALUE;
  node->size = p->WidthInBytes;
  node->source = over ? p->srcHost : (char *)p->srcDevice;
  node->target = over ? (char *)p->dstDevice : p->dstHost;
  if (!inside(node->source, node->size, over) || !inside(node->target, node->size, back)) return CUDA_ERROR_INVALID_VALUE;
  say("node copy %zu %s\n", node->size, over ? "over" : "back");
  return append(graph, node, out, before, count);
}
EXPORT CUresult cuGraphConditionalHandleCreate(CUgraphConditionalHandle *out, CUgraph graph, CUcontext context,
                                               unsigned value, unsigned flags) {
  if (value != 1 || flags != CU_GRAPH_COND_ASSIGN_DEFAULT || context != (CUcontext)0xC0) return CUDA_ERROR_INVALID_VALUE;
  return *out = (CUgraphConditionalHandle)calloc(1, sizeof(struct CUgraph_st)), 0;
}
EXPORT CUresult cuGraphAddNode(CUgraphNode *out, CUgraph graph, const CUgraphNode *before, const CUgraphEdgeData *edges,
                               size_t count, CUgraphNodeParams *p) {
  if (p->type != CU_GRAPH_NODE_TYPE_CONDITIONAL || p->conditional.type != CU_GRAPH_COND_TYPE_WHILE) return CUDA_ERROR_NOT_SUPPORTED;
  if (p->conditional.size != 1 || p->conditional.ctx != (CUcontext)0xC0 || edges) return CUDA_ERROR_INVALID_VALUE;
  Node *node = make(CU_GRAPH_NODE_TYPE_CONDITIONAL);
  node->body = (CUgraph)p->conditional.handle; /* the handle is the body */
  p->conditional.phGraph_out = malloc(sizeof(CUgraph));
  p->conditional.phGraph_out[0] = node->body;
  say("node while\n");
  return append(graph, node, out, before, count);
}
EXPORT CUresult cuGraphInstantiate(CUgraphExec *out, CUgraph graph, unsigned long long flags) {
  ++live, ++graph->instances;
  *out = malloc(sizeof **out);
  return (*out)->graph = graph, say("instantiate\n"), 0;
}
EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream s) {
  if (fake_refused) return fake_refused;
  return put(LAUNCH)->body = exec->graph, say("launch graph\n"), 0;
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
  --exec->graph->instances;
  return --live, release(exec->graph), free(exec), 0;
}

/* Where the fields of the structures that the bindings build by hand lie, as the header has them. */
#define AT(type, field) offsetof(type, field)
#include <stddef.h>
EXPORT const size_t fake_offsets[] = {
    sizeof(CUDA_KERNEL_NODE_PARAMS), AT(CUDA_KERNEL_NODE_PARAMS, sharedMemBytes), AT(CUDA_KERNEL_NODE_PARAMS, kernelParams),
    sizeof(CUDA_MEMCPY3D), AT(CUDA_MEMCPY3D, srcDevice), AT(CUDA_MEMCPY3D, dstHost), AT(CUDA_MEMCPY3D, WidthInBytes),
    sizeof(CUgraphNodeParams), AT(CUgraphNodeParams, conditional), AT(CUgraphNodeParams, conditional.phGraph_out),
};
