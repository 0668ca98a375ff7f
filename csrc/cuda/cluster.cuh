// Thread-block clusters (sm_90 and later): blocks that run together and read each other's shared memory.
#pragma once

#ifdef SGM_CUDA_ON_HOST
#define SGM_CLUSTERS 1
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SGM_CLUSTERS 1
#include <cooperative_groups.h>

namespace sgm::cuda {

struct Cluster {
  __device__ Cluster() : group(cooperative_groups::this_cluster()) {}
  __device__ int rank() const { return static_cast<int>(group.block_rank()); }
  __device__ const float* peer(float* shared, int rank) const { return group.map_shared_rank(shared, rank); }
  __device__ void arrive() { group.barrier_arrive(); }
  __device__ void wait() { group.barrier_wait(); }
  cooperative_groups::cluster_group group;
};

}  // namespace sgm::cuda
#endif
